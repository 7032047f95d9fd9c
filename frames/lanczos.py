"""More pixels: Lanczos resampling, and an upscaler run over overlapping tiles.

Images are [F, H, W, C] in [0, 1]; planes (B, C, H, W).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

LANCZOS_LOBES = 3
LANCZOS_BLOCK = 64  # outputs a matrix product: its band of the weights has few zeros


def even_side(side: int, scale: float) -> int:
    """`side * scale` rounded to the nearest even number of pixels, half upwards."""
    return 2 * math.floor(side * scale / 2 + 0.5)


def lanczos_weights(size_in: int, size_out: int, device: torch.device | None = None) -> Tensor:
    """The matrix (size_out, size_in) that resizes a line of pixels, float32.

    Lanczos with three lobes, antialiased when it shrinks; taps beyond the border are left out and the
    rest normalised, as in Pillow's Resample.c.
    """
    scale = size_in / size_out
    center = (torch.arange(size_out, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(size_in, dtype=torch.float64) + 0.5 - center[:, None]) / max(scale, 1.0)
    weights = torch.sinc(x) * torch.sinc(x / LANCZOS_LOBES) * (x.abs() < LANCZOS_LOBES)
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)


def lanczos(x: Tensor, height: int, width: int) -> Tensor:
    """Planes resized with Lanczos, rows first.

    Values are clamped to [0, 1] after each direction: Pillow does so as well, in 8 bits.

    Args:
        x: (B, C, H, W) float32 in [0, 1], on any device.
        height, width: of the result, in pixels.

    Returns:
        (B, C, height, width) float32 in [0, 1].
    """
    for dim, size in ((-1, width), (-2, height)):
        weights = lanczos_weights(x.shape[dim], size, x.device)
        y = x.new_empty((*x.shape[:-1], size) if dim == -1 else (*x.shape[:-2], size, x.shape[-1]))
        for first in range(0, size, LANCZOS_BLOCK):
            rows = weights[first : first + LANCZOS_BLOCK]
            used = rows.any(dim=0).nonzero()
            low, count = int(used[0]), int(used[-1] - used[0]) + 1
            rows = rows[:, low : low + count]
            source, target = x.narrow(dim, low, count), y.narrow(dim, first, len(rows))
            target.copy_(source @ rows.T if dim == -1 else rows @ source)
        x = y.clamp_(0, 1)
    return x


def tile_spans(length: int, tile: int, overlap: int) -> list[tuple[int, Tensor]]:
    """A side cut into tiles that overlap.

    Args:
        length: of the side, in pixels.
        tile: pixels of a tile; a shorter side is one tile.
        overlap: pixels that two tiles share at least.

    Returns:
        Where each tile starts, and its share (its size,) of every pixel. Shares fall linearly where tiles
        overlap and add up to 1.
    """
    size = min(tile, length)
    count = 1 + math.ceil((length - size) / max(1, size - overlap))
    firsts = [round(i * (length - size) / max(1, count - 1)) for i in range(count)]
    at = torch.arange(size, dtype=torch.float64)
    shares = torch.zeros(count, length, dtype=torch.float64)
    for i, first in enumerate(firsts):
        share = torch.ones(size, dtype=torch.float64)
        if i > 0:
            share = torch.minimum(share, (at + 1) / (firsts[i - 1] + size - first + 1))
        if i < count - 1:
            share = torch.minimum(share, (size - at) / (first + size - firsts[i + 1] + 1))
        shares[i, first : first + size] = share
    shares /= shares.sum(dim=0)
    return [(first, shares[i, first : first + size].float()) for i, first in enumerate(firsts)]


def upscale_tiled(
    upscale: Callable[[Tensor], Tensor],
    x: Tensor,
    scale: int,
    tile: int,
    overlap: int,
    on_tile: Callable[[], None] = lambda: None,
) -> Tensor:
    """Planes enlarged by an upscaler that sees overlapping tiles.

    Args:
        upscale: (B, 3, h, w) -> (B, 3, h * scale, w * scale).
        x: (B, 3, H, W) float32 in [0, 1].
        scale: of the upscaler.
        tile, overlap: pixels of `x`, tile > overlap.
        on_tile: called before each tile.

    Returns:
        (B, 3, H * scale, W * scale) float32, clamped to [0, 1].
    """
    batch, channels, height, width = x.shape
    y = x.new_zeros(batch, channels, height * scale, width * scale)
    for top, down in tile_spans(height, tile, overlap):
        for left, across in tile_spans(width, tile, overlap):
            on_tile()
            part = upscale(x[:, :, top : top + len(down), left : left + len(across)]).float()
            share = torch.outer(down, across).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            rows = slice(top * scale, (top + len(down)) * scale)
            columns = slice(left * scale, (left + len(across)) * scale)
            y[:, :, rows, columns] += part * share.to(y.device)
    return y.clamp_(0, 1)
