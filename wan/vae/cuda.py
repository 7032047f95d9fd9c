"""The VAE's convolutions on NVIDIA GPUs: channels last in memory, as their tensor cores read them.

The library's convolutions read channels side by side and would reorder every tensor, there and back; with
them as they want them, nothing is reordered but the weights, which it does at each call. What lies around a
convolution (norm and SiLU, the join with the frames before, bias, residual step) is done in few passes over
memory, since that took as long as the convolutions. PyTorch's own operations are the reference; `wan.kernels`
has the same in one pass each, taken where it has been found to agree on the device. Upsampling goes by phases
(phases.py).

    B batch    C D input, output channels    f frames of a chunk    H W height and width    k kernel frames
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..changed import lent
from .norm import RMSNorm, norm_silu
from .past import Past, batch_to_frames, frames_to_batch
from .phases import phase_filters

CHANNELS_LAST = torch.channels_last_3d
CHECK_SHAPE = 2, 3, 5, 7  # B, f, H, W on which a kernel is compared
TENSOR_CORES = (8, 0)  # least compute capability of those that multiply float32, as TF32


def suits(device: torch.device, itemsize: int) -> bool:
    """Whether convolutions of numbers of so many bytes run on tensor cores there, and so channels last."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.backends.cudnn.enabled:
        return False
    if itemsize != 4:
        return itemsize == 2
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= TENSOR_CORES
    return capable and torch.backends.cudnn.allow_tf32


class CudaPast(Past):
    """A `Past` with the convolutions of this file; where somebody changed one, it is called as elsewhere."""

    def arrange(self, chunk: Tensor) -> Tensor:
        """Channels side by side."""
        return chunk.contiguous(memory_format=CHANNELS_LAST)

    def causal_conv(
        self,
        conv: nn.Conv3d,
        x: Tensor,
        norm: RMSNorm | None = None,
        overwrite: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        lends = lent(conv, x.new_empty(0))  # what lends would hold x itself
        if lends is None:
            return super().causal_conv(conv, x, norm, overwrite, add_to)
        window = self.normed_window(conv, x, norm)
        del x  # free before the result takes room, where the caller kept no name for it
        with lends as (weight, bias):
            y = convolved(conv, window, weight)
            del window
            return add_bias(y, bias, None if add_to is None else self.arrange(add_to))

    def normed_window(self, conv: nn.Conv3d, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """`window` of silu(norm(x)), or of x; the frames go to their place in it as they are normed."""
        x, look_back = self.arrange(x), conv.kernel_size[0] - 1
        if norm is None and not look_back:
            return x
        b, c, f, h, w = x.shape
        window = torch.empty(
            (b, c, look_back + f, h, w), device=x.device, dtype=x.dtype, memory_format=CHANNELS_LAST
        )
        before = self.frames.pop(conv, x[:, :, :0])
        known = before.shape[2]
        window[:, :, : look_back - known] = 0  # before frame 0
        window[:, :, look_back - known : look_back] = before
        del before
        fresh = window[:, :, look_back:]
        if norm is None:
            fresh.copy_(x)
        else:
            norm_silu_into(fresh, x, norm)
        if look_back:
            self.keep(conv, window[:, :, -min(look_back, known + f) :])  # not the zeros before frame 0
        return window

    def upsample_conv(self, upsample: nn.Module, conv: nn.Conv2d, x: Tensor) -> Tensor:
        lends = lent(conv, x)
        if lends is None:
            return super().upsample_conv(upsample, conv, x)
        with lends as (weight, bias):
            return batch_to_frames(
                doubled_and_convolved(frames_to_batch(self.arrange(x)), weight, bias), x.shape[0]
            )


def doubled_and_convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """3x3 convolution, padded by 1, of x doubled in height and width: [N, C, H, W] -> [N, D, 2H, 2W].

    By phases; the filters are folded at each call, which costs little beside the convolution, so that they
    may come from anywhere. The bias is added where each phase goes to its place.
    """
    assert bias is not None
    n, _, h, w = x.shape
    filters = phase_filters(weight.float()).to(weight)
    phases = F.conv2d(x, filters, padding=1).chunk(4, 1)  # 4 of [N, D, H + 1, W + 1]
    y = x.new_empty(n, 2 * h, 2 * w, len(weight)).permute(0, 3, 1, 2)
    for phase, (p, q) in zip(phases, product(range(2), repeat=2)):
        torch.add(phase[:, :, p : p + h, q : q + w], bias.view(-1, 1, 1), out=y[:, :, p::2, q::2])
    return y


def convolved(conv: Any, x: Tensor, weight: Tensor) -> Tensor:
    """`conv` without its bias, which PyTorch would add in a slow pass of its own."""
    return conv._conv_forward(x, weight, None)


def norm_silu_into(out: Tensor, x: Tensor, norm: RMSNorm) -> None:
    """Writes silu(norm(x)) into `out`, both [B, C, f, H, W]."""
    if kernel := _kernel("norm_silu", x, out):
        kernel(x, norm.gamma.to(x).flatten(), norm.scale, out)
    else:
        norm_silu(norm, out.copy_(x), in_place=True)


def add_bias(y: Tensor, bias: Tensor | None, add_to: Tensor | None = None) -> Tensor:
    """y + bias + add_to, in the memory of y: [B, D, f, H, W]; the bias is [D]."""
    assert bias is not None  # each of Wan's convolutions has one
    if kernel := _kernel("add_bias", y, *([] if add_to is None else [add_to])):
        kernel(y, bias, add_to)
        return y
    y.add_(bias.view(-1, 1, 1, 1))
    return y if add_to is None else y.add_(add_to)


def kernel_choices(device: torch.device, dtype: torch.dtype, dim: int) -> dict[str, kernels.Choice]:
    """Which kernels a VAE of this many channels at its first level takes, by name."""
    found = {}
    for name in _DISTANCES:
        of_widths = [_choice(name, device, dtype, width * dim) for width in (1, 2, 4)]
        found[name] = next((choice for choice in of_widths if choice.function is None), of_widths[0])
    return found


def _kernel(name: str, *tensors: Tensor) -> Callable[..., Any] | None:
    """A kernel for tensors [B, C, f, H, W], where they lie as it needs them."""
    if torch.compiler.is_compiling() or not all(_lies_flat(t) for t in tensors):
        return None
    x = tensors[0]
    return _choice(name, x.device, x.dtype, x.shape[1]).function


def _lies_flat(x: Tensor) -> bool:
    """Whether each sample is a row of pixels, and a pixel a row of channels."""
    return type(x) is Tensor and x[:1].is_contiguous(memory_format=CHANNELS_LAST)


def _choice(name: str, device: torch.device, dtype: torch.dtype, width: int) -> kernels.Choice:
    return kernels.choose(name, device, dtype, (width,), partial(_DISTANCES[name], device, dtype, width))


def _random(device: torch.device, dtype: torch.dtype, *widths: int) -> list[Tensor]:
    """Small frames of so many channels each, as the layers see them."""
    g = torch.Generator().manual_seed(0)
    made = [torch.randn(CHECK_SHAPE[0], width, *CHECK_SHAPE[1:], generator=g) for width in widths]
    return [x.to(device, dtype).contiguous(memory_format=CHANNELS_LAST) for x in made]


@torch.no_grad()
def _norm_silu_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    """The relative difference of the kernel `norm_silu`."""
    x, out = _random(device, dtype, width, width)
    norm = RMSNorm(width, 3, device, dtype)
    norm.gamma.add_(0.1 * x[0, :, :1, :1, :1])
    kernel(x, norm.gamma.flatten(), norm.scale, out)
    return kernels.relative(out, norm_silu(norm, x))


@torch.no_grad()
def _add_bias_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    """The relative difference of the kernel `add_bias`, with and without a residual."""
    y, add_to = _random(device, dtype, width, width)
    bias = add_to[0, :, 0, 0, 0].contiguous()
    differences = []
    for residual in (add_to, None):
        ours, expected = y.clone(), y + bias.view(-1, 1, 1, 1)
        kernel(ours, bias, residual)
        differences.append(kernels.relative(ours, expected if residual is None else expected + residual))
    return max(differences)


_DISTANCES: dict[str, Callable[..., float]] = {
    "norm_silu": _norm_silu_distance,
    "add_bias": _add_bias_distance,
}
