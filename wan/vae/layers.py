"""Layers of the Wan2.1 video autoencoder. They know nothing of chunks or memory: executors walk them.

All are causal in time: an output frame needs its own and earlier input frames only. The earlier ones come
from a `Past`; a layer itself stores nothing. Executors see `Layer` records, never the modules.

Parameter names are the Wan2.1 release's (wan/modules/vae.py), so that its files load strictly.

    B batch    C channels    f frames of one chunk    H W height and width of the tensor at hand
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import RMSNorm
from .past import Past, batch_to_frames, frames_to_batch


class Layer(NamedTuple):
    """One entry of a stage, and what an executor must know of it.

    Attributes:
        run: run(x, past) -> y, both [B, C, f, H, W].
        convs: its convolutions that keep frames of the past.
        reach: pixels to each side of an output pixel that it reads, counted in the output. For tiles of a
            decode, hence set for the decoder's layers that act on a part of a frame.
        reach_back: frames before its own that an output frame reads, counted in the input; for a decode too.
        space: 2 where it doubles height and width.
        time: 2 where it doubles the frames, 0.5 where it halves them.
    """

    run: Callable[[Tensor, Past], Tensor]
    convs: tuple[nn.Conv3d, ...] = ()
    reach: int = 0
    reach_back: int = 0
    space: int = 1
    time: float = 1


Stage: TypeAlias = list[Layer]


def conv_layer(conv: nn.Conv3d) -> Layer:
    """A causal convolution as a layer of its own."""
    back = conv.kernel_size[0] - 1
    return Layer(lambda x, past: past.causal_conv(conv, x), (conv,) if back else (), reach_back=back)


class Block(nn.Module):
    """A module that is one layer."""

    def layer(self) -> Layer:
        """What executors see of it."""
        raise NotImplementedError


class ResidualBlock(Block):
    """Twice norm, SiLU and convolution, added to the input or to its projection to `out_dim` channels."""

    residual: Any  # indexed as the release's, in whose names the parameters are stored

    def __init__(self, in_dim: int, out_dim: int, ops: Any, **kw: Any):
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

    def layer(self) -> Layer:
        return Layer(self, (self.residual[2], self.residual[6]), reach=2, reach_back=4)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        return past.causal_conv(
            conv2,
            past.causal_conv(conv1, x, norm1),  # not kept here: it may be free before the second result
            norm2,
            overwrite=True,
            add_to=self.shortcut(x),
        )


# How the pixels of a frame attend to each other: q, k, v -> what they found, all [1, 1, H W, C].
AttendFrame: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend_frame(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """By PyTorch's attention."""
    return F.scaled_dot_product_attention(q, k, v)


class AttentionBlock(Block):
    """Single-head attention among the pixels of one frame.

    Attributes:
        attend: an `AttendFrame`; a host may set its own.
    """

    attend: AttendFrame = staticmethod(attend_frame)

    def __init__(self, dim: int, ops: Any, **kw: Any):
        super().__init__()
        self.norm = RMSNorm(dim, 2, **kw)
        self.to_qkv = ops.Conv2d(dim, dim * 3, 1, **kw)
        self.proj = ops.Conv2d(dim, dim, 1, **kw)

    def layer(self) -> Layer:
        return Layer(self)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        b, c, f, h, w = x.shape
        y = frames_to_batch(x)  # [B f, C, H, W]
        qkv = self.to_qkv(self.norm(y)).flatten(2).transpose(1, 2).unsqueeze(1)  # [B f, 1, H W, 3C]
        # Flash and memory-efficient kernels need stride 1 in the last dim; on CUDA it is H W here.
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in qkv.chunk(3, dim=-1))
        frames = []  # one by one: a frame of 832x480 takes a CPU half a second, and a cancel waits that long
        for one in zip(*(t.split(1) for t in (q, k, v))):
            past.check()
            frames.append(self.attend(*one))
        y = torch.cat(frames)  # [B f, 1, H W, C]
        y = self.proj(y.squeeze(1).transpose(1, 2).reshape(b * f, c, h, w))
        return x + batch_to_frames(y, b)


class Upsample(nn.Module):
    """Doubles height and width and halves the channels; with `in_time` it doubles the frame rate first.

    Frame 0 has no partner in time: it passes unchanged, and the doubling convolution starts at frame 1.
    """

    resample: Any  # indexed as the release's
    time_conv: Any  # None where the frame rate stays

    def __init__(self, dim: int, in_time: bool, ops: Any, **kw: Any):
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"),
            ops.Conv2d(dim, dim // 2, 3, padding=1, **kw),
        )
        self.time_conv = ops.Conv3d(dim, dim * 2, (3, 1, 1), **kw) if in_time else None

    def time_layer(self) -> Layer | None:
        """The doubling of the frame rate, if there is one."""
        if self.time_conv is None:
            return None
        # Two frames for the convolution, and one more: a stream that starts late passes its first frame
        # undoubled, and that result is dropped.
        return Layer(self.double_time, (self.time_conv,), reach_back=3, time=2)

    def space_layer(self) -> Layer:
        """The doubling of height and width."""
        return Layer(self.double_space, reach=1, space=2)

    def double_time(self, x: Tensor, past: Past) -> Tensor:
        """[B, C, f, H, W] -> [B, C, 2f, H, W], one frame less in the chunk that holds frame 0."""
        if past.started(self):
            return self._double(x, past)
        past.keep(self, x[:, :, :0])  # notes that frame 0 has passed
        first, rest = x[:, :, :1], x[:, :, 1:]
        return torch.cat((first, self._double(rest, past)), 2) if rest.shape[2] else first

    def _double(self, x: Tensor, past: Past) -> Tensor:
        pairs = past.causal_conv(self.time_conv, x).unflatten(1, (2, x.shape[1]))  # [B, 2, C, f, H, W]
        return torch.stack(pairs.unbind(1), 3).flatten(2, 3)

    def double_space(self, x: Tensor, past: Past) -> Tensor:
        """[B, C, f, H, W] -> [B, C / 2, f, 2H, 2W]."""
        upsample, conv = self.resample
        return past.upsample_conv(upsample, conv, x)


class Downsample(nn.Module):
    """Halves height and width; with `in_time` it halves the frame rate after, where frame 0 stays alone."""

    resample: Any  # indexed as the release's
    time_conv: Any  # None where the frame rate stays

    def __init__(self, dim: int, in_time: bool, ops: Any, **kw: Any):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), ops.Conv2d(dim, dim, 3, stride=2, **kw))
        self.time_conv = ops.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1), **kw) if in_time else None

    def space_layer(self) -> Layer:
        """The halving of height and width."""
        return Layer(self.halve_space, reach=1)

    def time_layer(self) -> Layer | None:
        """The halving of the frame rate, if there is one."""
        return None if self.time_conv is None else Layer(self.halve_time, (self.time_conv,), time=0.5)

    def halve_space(self, x: Tensor, past: Past) -> Tensor:
        """[B, C, f, H, W] -> [B, C, f, H / 2, W / 2]."""
        return batch_to_frames(self.resample(frames_to_batch(x)), x.shape[0])

    def halve_time(self, x: Tensor, past: Past) -> Tensor:
        """[B, C, f, H, W] -> about f/2 frames: (0), (0 1 2), (2 3 4), ...; a frame without its pair waits."""
        first = x[:, :, :0] if past.started(self) else x[:, :, :1]
        window = past.join(self, x)
        n = (window.shape[2] - 1) // 2
        past.keep(self, window[:, :, 2 * n :])
        return torch.cat((first, self.time_conv(window)), 2) if n else first


class Head(nn.Sequential):
    """Norm, SiLU, convolution to the output channels."""

    def __init__(self, dim: int, out_dim: int, ops: Any, **kw: Any):
        conv = ops.Conv3d(dim, out_dim, 3, padding=(0, 1, 1), **kw)
        super().__init__(RMSNorm(dim, 3, **kw), nn.SiLU(), conv)

    def layer(self) -> Layer:
        return Layer(self, (self.parts()[2],), reach=1, reach_back=2)

    def parts(self) -> tuple[RMSNorm, nn.SiLU, nn.Conv3d]:
        """Its modules, typed."""
        return cast("tuple[RMSNorm, nn.SiLU, nn.Conv3d]", tuple(self))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        norm, _, conv = self.parts()
        return past.causal_conv(conv, x, norm, overwrite=True)


def middle_blocks(dim: int, ops: Any, **kw: Any) -> nn.Sequential:
    """The blocks at the lowest resolution."""
    return nn.Sequential(
        ResidualBlock(dim, dim, ops, **kw), AttentionBlock(dim, ops, **kw), ResidualBlock(dim, dim, ops, **kw)
    )


class Encoder(nn.Module):
    """RGB frames to latent mean and log-variance, channels 3 -> 2 z_dim."""

    downsamples: Any  # ResidualBlock and Downsample
    middle: Any  # Block

    def __init__(self, dim: int, z_dim: int, ops: Any, **kw: Any):
        super().__init__()
        widths = [dim, dim, dim * 2, dim * 4, dim * 4]
        self.conv1: nn.Conv3d = ops.Conv3d(3, dim, 3, padding=(0, 1, 1), **kw)
        layers = []
        for level, (in_dim, out_dim) in enumerate(pairwise(widths)):
            layers += [ResidualBlock(in_dim, out_dim, ops, **kw), ResidualBlock(out_dim, out_dim, ops, **kw)]
            if level < 3:
                layers.append(Downsample(out_dim, level > 0, ops, **kw))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle_blocks(dim * 4, ops, **kw)
        self.head = Head(dim * 4, z_dim * 2, ops, **kw)

    def stages(self) -> list[Stage]:
        """The layers in order, a new stage wherever the size of a frame has changed."""
        stages: list[Stage] = [[conv_layer(self.conv1)]]
        for block in self.downsamples:
            if isinstance(block, Downsample):
                stages[-1].append(block.space_layer())
                time = block.time_layer()
                stages.append([time] if time else [])
            else:
                stages[-1].append(block.layer())
        stages[-1] += [block.layer() for block in (*self.middle, self.head)]
        return stages


class Decoder(nn.Module):
    """Latents to RGB frames, channels z_dim -> 3."""

    middle: Any  # Block
    upsamples: Any  # ResidualBlock and Upsample

    def __init__(self, dim: int, z_dim: int, ops: Any, **kw: Any):
        super().__init__()
        widths = [(4, 4), (2, 4), (2, 2), (1, 1)]  # the upsampling halves the channels
        self.conv1: nn.Conv3d = ops.Conv3d(z_dim, dim * 4, 3, padding=(0, 1, 1), **kw)
        self.middle = middle_blocks(dim * 4, ops, **kw)
        layers = []
        for level, (first, rest) in enumerate(widths):
            layers.append(ResidualBlock(dim * first, dim * rest, ops, **kw))
            layers += [ResidualBlock(dim * rest, dim * rest, ops, **kw) for _ in range(2)]
            if level < 3:
                layers.append(Upsample(dim * rest, level < 2, ops, **kw))
        self.upsamples = nn.Sequential(*layers)
        self.head = Head(dim, 3, ops, **kw)

    def stages(self) -> list[Stage]:
        """First the layers that read whole frames; then a new stage wherever a frame is doubled."""
        stages: list[Stage] = [[conv_layer(self.conv1), *(block.layer() for block in self.middle)], []]
        for block in self.upsamples:
            if isinstance(block, Upsample):
                time = block.time_layer()
                stages[-1] += [time] if time else []
                stages.append([block.space_layer()])
            else:
                stages[-1].append(block.layer())
        stages[-1].append(self.head.layer())
        return stages
