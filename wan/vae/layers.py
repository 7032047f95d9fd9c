"""Layers of the Wan2.1 video autoencoder. They know nothing of chunks or memory: executors walk them.

All are causal in time: an output frame needs its own and earlier input frames only. The earlier ones come
from a `Past`; a layer itself stores nothing. Executors see `Layer` records, never the modules.

Parameter names are the Wan2.1 release's (wan/modules/vae.py), so that its files load strictly.

    B batch    C channels    f frames of one chunk    H W height and width of the tensor at hand
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from . import cpu


class Layer(NamedTuple):
    """One entry of a stage, and what an executor must know of it.

    Attributes:
        run: run(x, past) -> y, both [B, C, f, H, W].
        convs: its convolutions that keep frames of the past.
        reach: pixels to each side of an output pixel that it reads, counted in the output.
        reach_back: frames before its own that an output frame reads, counted in the input.
        space: 2 where it doubles height and width.
        time: 2 where it doubles the frames, 0.5 where it halves them.
    """

    run: Callable[[torch.Tensor, "Past"], torch.Tensor]
    convs: tuple[nn.Module, ...] = ()
    reach: int = 0
    reach_back: int = 0
    space: int = 1
    time: float = 1


class Past:
    """The input frames that causal layers still need, for one stream; made by an executor.

    Args:
        check: Called between pieces of work; raises to stop the stream. None is nothing.
    """

    def __init__(self, check=None):
        self.frames = {}
        self.check = check or (lambda: None)

    def started(self, layer):
        return layer in self.frames

    def keep(self, layer, frames):
        self.frames[layer] = frames.clone()  # a view would hold the whole chunk

    def join(self, layer, x):
        """The frames kept for `layer`, then `x`."""
        return torch.cat((self.frames[layer], x), 2) if layer in self.frames else x


def causal_conv(conv, x, past, norm=None, overwrite=False, add_to=None):
    """Convolution whose frame t sees frames t-k+1 ... t, with zeros before the first one.

    With `norm` it is of silu(norm(x)), for which `overwrite` allows the use of x's memory; with `add_to`
    the result is added to that. Both in place only when no gradient is recorded.
    """
    keep = conv.kernel_size[0] - 1
    before = past.frames.get(conv)
    if keep and cpu.fits(conv, x):
        y, past.frames[conv] = cpu.causal_conv3(conv, before, x, norm, add_to, past.check)
        return y
    if norm is not None:
        x = norm_silu(norm, x, overwrite)
    if keep:
        past.keep(conv, x[:, :, -keep:] if x.shape[2] >= keep else past.join(conv, x)[:, :, -keep:])
    if keep and before is None and x.shape[2] == 1 and torch.is_grad_enabled():
        y = conv2d_of_last_tap(conv, x)
        return y if add_to is None else add_to + y
    missing = keep - (0 if before is None else before.shape[2])
    parts = [x.new_zeros(*x.shape[:2], missing, *x.shape[3:])] * (missing > 0) + [before] * (
        before is not None
    )
    y = conv(torch.cat((*parts, x), 2) if parts else x)
    if add_to is None:
        return y
    return add_to + y if torch.is_grad_enabled() else add_to.add_(y)


def conv_layer(conv):
    """A causal convolution as a layer of its own."""
    back = conv.kernel_size[0] - 1
    return Layer(partial(causal_conv, conv), (conv,) if back else (), reach_back=back)


def conv2d_of_last_tap(conv, x):
    """`conv` of a clip's first frame alone: the other taps meet zeros. Training on stills is 3x faster."""
    return F.conv2d(x[:, :, 0], conv.weight[:, :, -1], conv.bias, padding=conv.padding[1:]).unsqueeze(2)


class RMSNorm(nn.Module):
    """Scales each pixel's channel vector to length sqrt(C), then by `gamma`; [B, C, ...] -> same."""

    def __init__(self, dim, spatial_dims, device=None, dtype=None):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims, device=device, dtype=dtype))

    def forward(self, x, in_place=False):
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        # A float16 holds no scale of a vector near zero: inf * 0 would be NaN.
        largest = torch.finfo(x.dtype).max
        scale = (self.scale / length.clamp_min(1e-12)).clamp_max(largest).to(x)
        gamma = self.gamma.to(x)
        return x.mul_(scale).mul_(gamma) if in_place else x * scale * gamma


def norm_silu(norm, x, in_place=False):
    """silu(norm(x)); `in_place` overwrites x, unless a gradient is recorded."""
    if torch.is_grad_enabled():
        return F.silu(norm(x))
    return F.silu(norm(x if in_place else x.clone(), in_place=True), inplace=True)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim, out_dim, ops, **kw):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(in_dim, 3, **kw),
            nn.SiLU(),
            ops.Conv3d(in_dim, out_dim, 3, padding=(0, 1, 1), **kw),
            RMSNorm(out_dim, 3, **kw),
            nn.SiLU(),
            nn.Identity(),  # the release's dropout, which is 0
            ops.Conv3d(out_dim, out_dim, 3, padding=(0, 1, 1), **kw),
        )
        self.shortcut = ops.Conv3d(in_dim, out_dim, 1, **kw) if in_dim != out_dim else nn.Identity()

    def layer(self):
        return Layer(self, (self.residual[2], self.residual[6]), reach=2, reach_back=4)

    def forward(self, x, past):
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        h = causal_conv(conv1, x, past, norm1)
        return causal_conv(conv2, h, past, norm2, overwrite=True, add_to=self.shortcut(x))


class AttentionBlock(nn.Module):
    """Single-head attention among the pixels of one frame."""

    def __init__(self, dim, ops, **kw):
        super().__init__()
        self.norm = RMSNorm(dim, 2, **kw)
        self.to_qkv = ops.Conv2d(dim, dim * 3, 1, **kw)
        self.proj = ops.Conv2d(dim, dim, 1, **kw)

    def layer(self):
        return Layer(self)

    def forward(self, x, past):
        b, c, f, h, w = x.shape
        y = frames_to_batch(x)  # [B f, C, H, W]
        qkv = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B f, 1, H W, 3C]
        # On CUDA channels are not last here, and kernels that spare the [H W, H W] matrix ask for that.
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in qkv.chunk(3, dim=-1))
        frames = []  # one by one: on a CPU one of 832x480 takes half a second, and a cancel waits
        for one in zip(*(t.split(1) for t in (q, k, v))):
            past.check()
            frames.append(F.scaled_dot_product_attention(*one))
        y = torch.cat(frames)  # [B f, 1, H W, C]
        y = self.proj(y.squeeze(1).transpose(1, 2).reshape(b * f, c, h, w))
        return x + batch_to_frames(y, b)


class Resample(nn.Module):
    """Halves (`down`) or doubles (`up`) height and width, and with `in_time` the frame rate.

    Frame 0 has no partner in time: it passes unchanged, and the doubling convolution starts at frame 1.
    """

    def __init__(self, dim, direction, in_time, ops, **kw):
        super().__init__()
        self.up, self.in_time = direction == "up", in_time
        if self.up:
            self.resample = nn.Sequential(
                nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
                ops.Conv2d(dim, dim // 2, 3, padding=1, **kw),
            )
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(dim, dim, 3, stride=2, **kw))
        if in_time and self.up:
            self.time_conv = ops.Conv3d(dim, dim * 2, (3, 1, 1), **kw)
        elif in_time:
            self.time_conv = ops.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), **kw)

    def space_layer(self):
        return Layer(self.space, reach=1, space=2 if self.up else 1)

    def time_layer(self):
        if self.up:  # two frames of the convolution, and the first one that passes unchanged
            return Layer(self.time_up, (self.time_conv,), reach_back=3, time=2)
        return Layer(self.time_down, (self.time_conv,), time=0.5)

    def space(self, x, past):
        frames = frames_to_batch(x)
        if self.up and cpu.fits(self.resample[1], x):
            return batch_to_frames(cpu.upsample_conv(self.resample[1], frames, past.check), x.shape[0])
        return batch_to_frames(self.resample(frames), x.shape[0])

    def time_up(self, x, past):
        """[B, C, f, H, W] -> [B, C, 2f, H, W], one frame less in the chunk that holds frame 0."""
        if past.started(self):
            return self._double(x, past)
        past.keep(self, x[:, :, :0])
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat((first, self._double(rest, past)), 2) if rest.shape[2] else first

    def _double(self, x, past):
        pairs = causal_conv(self.time_conv, x, past).unflatten(1, (2, x.shape[1]))  # [B, 2, C, f, H, W]
        return torch.stack(pairs.unbind(1), 3).flatten(2, 3)

    def time_down(self, x, past):
        """[B, C, f, H, W] -> about f/2 frames: (0), (0 1 2), (2 3 4), ...; a frame without its pair waits."""
        first = x[:, :, :0] if past.started(self) else x[:, :, :1]
        window = past.join(self, x)
        n = (window.shape[2] - 1) // 2
        past.keep(self, window[:, :, 2 * n :])
        return torch.cat((first, self.time_conv(window)), 2) if n else first


def frames_to_batch(x):
    """[B, C, f, H, W] -> [B f, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x, batch):
    """[B f, C, H, W] -> [B, C, f, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


class Head(nn.Sequential):
    """Norm, SiLU, convolution to the output channels."""

    def __init__(self, dim, out_dim, ops, **kw):
        super().__init__(
            RMSNorm(dim, 3, **kw), nn.SiLU(), ops.Conv3d(dim, out_dim, 3, padding=(0, 1, 1), **kw)
        )

    def layer(self):
        return Layer(self, (self[2],), reach=1, reach_back=2)

    def forward(self, x, past):
        return causal_conv(self[2], x, past, self[0], overwrite=True)


def middle_blocks(dim, ops, **kw):
    return nn.Sequential(
        ResidualBlock(dim, dim, ops, **kw), AttentionBlock(dim, ops, **kw), ResidualBlock(dim, dim, ops, **kw)
    )


class Encoder(nn.Module):
    """RGB frames to latent mean and log-variance, channels 3 -> 2 z_dim."""

    def __init__(self, dim, z_dim, ops, **kw):
        super().__init__()
        widths = [dim, dim, dim * 2, dim * 4, dim * 4]
        self.conv1 = ops.Conv3d(3, dim, 3, padding=(0, 1, 1), **kw)
        layers = []
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(in_dim, out_dim, ops, **kw), ResidualBlock(out_dim, out_dim, ops, **kw)]
            if level < 3:
                layers.append(Resample(out_dim, "down", level > 0, ops, **kw))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle_blocks(dim * 4, ops, **kw)
        self.head = Head(dim * 4, z_dim * 2, ops, **kw)

    def stages(self):
        """Lists of layers, a new list wherever the size of a frame has changed."""
        stages = [[conv_layer(self.conv1)]]
        for layer in self.downsamples:
            if not isinstance(layer, Resample):
                stages[-1].append(layer.layer())
                continue
            stages[-1].append(layer.space_layer())
            stages.append([layer.time_layer()] if layer.in_time else [])
        stages[-1] += [layer.layer() for layer in (*self.middle, self.head)]
        return stages


class Decoder(nn.Module):
    """Latents to RGB frames, channels z_dim -> 3."""

    def __init__(self, dim, z_dim, ops, **kw):
        super().__init__()
        widths = [(4, 4), (2, 4), (2, 2), (1, 1)]  # the upsampling halves the channels
        self.conv1 = ops.Conv3d(z_dim, dim * 4, 3, padding=(0, 1, 1), **kw)
        self.middle = middle_blocks(dim * 4, ops, **kw)
        layers = []
        for level, (first, rest) in enumerate(widths):
            layers.append(ResidualBlock(dim * first, dim * rest, ops, **kw))
            layers += [ResidualBlock(dim * rest, dim * rest, ops, **kw) for _ in range(2)]
            if level < 3:
                layers.append(Resample(dim * rest, "up", level < 2, ops, **kw))
        self.upsamples = nn.Sequential(*layers)
        self.head = Head(dim, 3, ops, **kw)

    def stages(self):
        """Lists of layers: those that need whole frames; then a new list wherever a frame is doubled."""
        stages = [[conv_layer(self.conv1), *(layer.layer() for layer in self.middle)], []]
        for layer in self.upsamples:
            if not isinstance(layer, Resample):
                stages[-1].append(layer.layer())
                continue
            if layer.in_time:
                stages[-1].append(layer.time_layer())
            stages.append([layer.space_layer()])
        stages[-1].append(self.head.layer())
        return stages
