"""What one stream of chunks remembers between chunks, and how its convolutions are computed.

An executor makes one `Past` for a stream (stream.py) and hands it to every layer; layers store nothing.

    B batch    C D input, output channels    f frames of one chunk    H W height and width    k kernel frames
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from .norm import RMSNorm, norm_silu

Check: TypeAlias = Callable[[], object]


class Past:
    """Plain convolutions, in place where that saves memory; so no gradient may be recorded.

    Args:
        check: called between pieces of work; may raise, to stop the stream.
    """

    def __init__(self, check: Check | None = None):
        self.check: Check = check or (lambda: None)
        self.frames: dict[nn.Module, Tensor] = {}

    def started(self, layer: nn.Module) -> bool:
        """Whether `layer` has kept anything yet, be it no frames."""
        return layer in self.frames

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Replaces what is kept for `layer`."""
        self.frames[layer] = frames.clone()  # a view would keep the whole chunk alive

    def join(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The frames kept for `layer`, then x."""
        return torch.cat((self.frames[layer], x), 2) if layer in self.frames else x

    def window(self, conv: nn.Conv3d, x: Tensor) -> Tensor:
        """All that `conv` reads for the frames of x, zeros before frame 0; keeps what the next chunk needs.

        [B, C, f, H, W] -> [B, C, k - 1 + f, H, W]
        """
        look_back = conv.kernel_size[0] - 1
        if not look_back:
            return x
        window = self.join(conv, x)
        self.keep(conv, (x if x.shape[2] >= look_back else window)[:, :, -look_back:])
        missing = look_back + x.shape[2] - window.shape[2]
        if not missing:
            return window
        return torch.cat((x.new_zeros(*x.shape[:2], missing, *x.shape[3:]), window), 2)

    def arrange(self, chunk: Tensor) -> Tensor:
        """A chunk in the memory layout that the convolutions are fastest with."""
        return chunk

    def causal_conv(
        self,
        conv: nn.Conv3d,
        x: Tensor,
        norm: RMSNorm | None = None,
        overwrite: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        """`conv` of silu(norm(x)), each frame seeing itself and the k - 1 before it, plus `add_to`.

        Args:
            x: [B, C, f, H, W].
            norm: None for `conv` of x itself.
            overwrite: allows the use of x's memory.
            add_to: [B, D, f, H, W], which may be overwritten too.

        Returns:
            [B, D, f, H, W]
        """
        if norm is not None:
            x = norm_silu(norm, x if overwrite else x.clone(), in_place=True)
        y = conv(self.window(conv, x))
        return y if add_to is None else add_to.add_(y)

    def upsample_conv(self, upsample: nn.Module, conv: nn.Conv2d, x: Tensor) -> Tensor:
        """`conv` of the frames of x, doubled by `upsample`: [B, C, f, H, W] -> [B, D, f, 2H, 2W]."""
        return batch_to_frames(conv(upsample(frames_to_batch(x))), x.shape[0])


class RecordedPast(Past):
    """Overwrites nothing, since the gradients that are recorded need every tensor as it was."""

    def causal_conv(
        self,
        conv: nn.Conv3d,
        x: Tensor,
        norm: RMSNorm | None = None,
        overwrite: bool = False,
        add_to: Tensor | None = None,
    ) -> Tensor:
        if norm is not None:
            x = norm_silu(norm, x)
        y = conv(self.window(conv, x))
        return y if add_to is None else add_to + y


def frames_to_batch(x: Tensor) -> Tensor:
    """[B, C, f, H, W] -> [B f, C, H, W]."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_to_frames(x: Tensor, batch: int) -> Tensor:
    """[B f, C, H, W] -> [B, C, f, H, W]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)
