"""What lies between the matrix products and the attention: norms, modulation, residual steps, RoPE, GELU.

B batch, L tokens, D width, N heads. The stream x is [B, L, D] in float32; what goes into a product is in the
compute dtype. A residual step stands together with the norm that reads its result, so that one pass over the
stream can do both.

PyTorch's own operations are the reference. `wan.kernels` has the same in fewer passes, taken where tensors
may be changed in place, nothing is being compiled, and the kernel has been found to agree on the device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .changed import is_changed, lent
from .inplace import may_overwrite
from .kernels import relative
from .rope import apply_rope, axis_frequencies, rope_table

CHECK_TOKENS = 64  # on which a kernel is compared; a square, and so a grid


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """adaLN: LayerNorm(x)*(1 + scale) + shift in float32, then `dtype`. x [B, L, D], the others [B, 1, D]."""
    if kernel := _residual_norm(x, None, dtype):
        return kernel(x, None, None, (1 + scale, shift), eps, dtype)
    return _modulated(x, shift, scale, eps, dtype)


def added(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Residual step x + y*gate, in x's dtype; on the stream itself where it `may_overwrite`.

    Args:
        x, y: of one shape, [B, L, D] in the blocks.
        gate: [B, 1, D], or None for 1.
    """
    if kernel := _residual_norm(x, y, y.dtype):
        kernel(x, y, gate, None, 0.0, y.dtype)
        return x
    return _added(x, y, gate)


def added_then_modulated(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`added` without a gate, and `modulated` of that."""
    if kernel := _residual_norm(x, y, dtype):
        return x, kernel(x, y, None, (1 + scale, shift), eps, dtype)
    x = _added(x, y, None)
    del y  # free before the norm takes room, where the caller kept no name for it
    return x, _modulated(x, shift, scale, eps, dtype)


def added_then_normed(
    x: Tensor, y: Tensor, gate: Tensor, norm: nn.Module, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`added`, and a layer `norm` of that, in float32 and then `dtype`."""
    kernel = _residual_norm(x, y, dtype)
    if kernel and (lends := lent(norm, x)):
        with lends as (weight, bias):
            return x, kernel(x, y, gate, (weight, bias), norm.eps, dtype)
    x = _added(x, y, gate)
    del y
    return x, norm(x).to(dtype)


def normed_heads(x: Tensor, norm: nn.Module, heads: int, rope: Tensor | None = None) -> Tensor:
    """Queries or keys [B, L, D] -> [B, L, N, D/N]: RMSNorm over all heads together, then turned by `rope`.

    Args:
        norm: the layer.
        heads: N.
        rope: from `rope_table`, the rows of these tokens; None turns nothing.
    """
    kernel = _rms_rope(x, heads)
    if kernel and (lends := lent(norm, x)):
        with lends as (weight, _):
            return kernel(x, weight, norm.eps, heads, rope)
    x = norm(x).unflatten(-1, (heads, -1))
    return x if rope is None else apply_rope(x, rope)


class GELU(nn.Module):
    """GELU by tanh. Its input, the hidden layer, is the largest tensor of a step: no second one where it
    `may_overwrite`."""

    def forward(self, x: Tensor) -> Tensor:
        if may_overwrite():
            return torch.ops.aten.gelu_(x, approximate="tanh")
        return F.gelu(x, approximate="tanh")


def activated(x: Tensor, linear: nn.Module, activation: nn.Module) -> Tensor:
    """`activation` of a product: [B, L, D] -> [B, L, hidden]. A GELU rides on the product where it can."""
    rides = _takes_kernels(x) and type(activation) is GELU and not is_changed(activation)
    kernel = _choice("gelu_product", x.device, x.dtype, x.shape[-1]).function if rides else None
    if kernel and (lends := lent(linear, x)):
        with lends as (weight, bias):
            return kernel(x, weight, bias)
    return activation(linear(x))


def kernel_choices(
    device: torch.device, dtype: torch.dtype, width: int, head_dim: int
) -> dict[str, kernels.Choice]:
    """Which kernels a model of this width takes on a device, by name."""
    sizes = {"residual_norm": (width,), "rms_rope": (width, head_dim), "gelu_product": (width,)}
    return {name: _choice(name, device, dtype, *numbers) for name, numbers in sizes.items()}


def _modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    if x.shape[0] == 1:  # one kernel: the modulation is the norm's affine part
        y = F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
    else:
        y = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    return y.to(dtype)  # (B, L, D)


def _added(x: Tensor, y: Tensor, gate: Tensor | None) -> Tensor:
    if may_overwrite():  # y is widened while it is read: no float32 copy of it
        return x.add_(y) if gate is None else x.addcmul_(y, gate)
    return x + y if gate is None else torch.addcmul(x, y.float(), gate)


def _residual_norm(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> Callable[..., Any] | None:
    if not _takes_kernels(x) or x.dtype != torch.float32:
        return None
    if y is not None and not (_takes_kernels(y) and y.dtype == dtype and y.shape == x.shape):
        return None
    return _choice("residual_norm", x.device, dtype, x.shape[-1]).function


def _rms_rope(x: Tensor, heads: int) -> Callable[..., Any] | None:
    if not _takes_kernels(x):
        return None
    width = x.shape[-1]
    return _choice("rms_rope", x.device, x.dtype, width, width // heads).function


def _takes_kernels(x: Tensor) -> bool:
    """Whether a kernel could be called on [B, L, D]: the tokens of each sample lie one after the other."""
    if torch.compiler.is_compiling() or not may_overwrite() or type(x) is not Tensor:
        return False
    return x.ndim == 3 and x.stride()[1:] == (x.shape[-1], 1)


def _choice(name: str, device: torch.device, dtype: torch.dtype, *sizes: int) -> kernels.Choice:
    distance = partial(_DISTANCES[name], device, dtype, *sizes)
    return kernels.choose(name, device, dtype, sizes, distance)


@torch.no_grad()
def _residual_norm_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    """The largest relative difference of the kernel `residual_norm`, in all the ways it is called here."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, CHECK_TOKENS, width, generator=g).to(device) for _ in range(2))
    x, y = 3 * x + 0.5, y.to(dtype)
    gate, shift, scale = (0.3 * torch.randn(2, 1, width, generator=g).to(device) for _ in range(3))
    eps = 1e-6
    differences = [
        relative(
            kernel(x, None, None, (1 + scale, shift), eps, dtype), _modulated(x, shift, scale, eps, dtype)
        )
    ]
    for factor in (gate, None):
        ours, alone = x.clone(), x.clone()
        normed = kernel(ours, y, factor, (1 + scale, shift), eps, dtype)
        kernel(alone, y, factor, None, eps, dtype)
        expected = _added(x.clone(), y, factor)
        differences += [relative(ours, expected), relative(alone, expected)]
        differences.append(relative(normed, _modulated(expected, shift, scale, eps, dtype)))
    return max(differences)


@torch.no_grad()
def _rms_rope_distance(
    device: torch.device, dtype: torch.dtype, width: int, head_dim: int, kernel: Callable
) -> float:
    """The largest relative difference of the kernel `rms_rope`, with and without a rotation."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, CHECK_TOKENS, width, generator=g).to(device, dtype)
    weight = (1 + 0.1 * torch.randn(width, generator=g)).to(device, dtype)
    side = round(CHECK_TOKENS**0.5)
    table = rope_table(axis_frequencies(head_dim), (1, side, side), device)
    heads = width // head_dim
    normed = F.rms_norm(x, (width,), weight, 1e-6).unflatten(-1, (heads, -1))
    plain = relative(kernel(x, weight, 1e-6, heads, None), normed)
    return max(plain, relative(kernel(x, weight, 1e-6, heads, table), apply_rope(normed, table)))


@torch.no_grad()
def _gelu_product_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    """The relative difference of `gelu_product`, on a hidden layer as narrow as there are tokens."""
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(2, CHECK_TOKENS, width, generator=g).to(device, dtype) for _ in range(2))
    weight, bias = weight[0] / width**0.5, x[0, 0, :CHECK_TOKENS].contiguous()
    return relative(kernel(x, weight, bias), F.gelu(F.linear(x, weight, bias), approximate="tanh"))


_DISTANCES: dict[str, Callable[..., float]] = {
    "residual_norm": _residual_norm_distance,
    "rms_rope": _rms_rope_distance,
    "gelu_product": _gelu_product_distance,
}
