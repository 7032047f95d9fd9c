"""Overlapping tiles of a frame and the weights that blend them; a plan of numbers, no model in sight.

h, w: latent height and width; scale: blended values per latent pixel, 8 for RGB and 1 for latents.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    ys: slice  # latent rows
    xs: slice  # latent columns
    weight: torch.Tensor  # [rows * scale, columns * scale]; over all tiles they add up to 1 everywhere


def plan_tiles(h, w, tile_y, tile_x, overlap, scale):
    """Tiles of tile_y x tile_x (or the whole side, if that is smaller) covering h x w, in latent pixels.

    Neighbours share `overlap` pixels, the last two of a row or column maybe more: all tiles are of one
    size. Across a shared strip the weight falls linearly.

    Raises:
        ValueError: If the overlap leaves no step from tile to tile.
    """
    if min(tile_y, tile_x) < 1 or not 0 <= overlap < min(tile_y, tile_x):
        raise ValueError(
            f"VAE tiles of {tile_x} x {tile_y} latent pixels with overlap {overlap}: the overlap must be at "
            f"least 0 and smaller than both sides of the tile. Use for example tile 32 and overlap 8."
        )
    rows = list(zip(*_cut(h, tile_y, overlap, scale)))
    columns = list(zip(*_cut(w, tile_x, overlap, scale)))
    return [Tile(ys, xs, wy[:, None] * wx) for ys, wy in rows for xs, wx in columns]


def _cut(size, tile, overlap, scale):
    """Spans of one axis and their weights, each [span * scale]."""
    starts = [*range(0, size - tile, tile - overlap), size - tile] if tile < size else [0]
    tile = min(tile, size)
    spans = [slice(start, start + tile) for start in starts]
    ramp = torch.arange(tile * scale, dtype=torch.float64).add(0.5) / max(1, overlap * scale)
    weights, total = [], torch.zeros(size * scale, dtype=torch.float64)
    for span in spans:
        weight = torch.ones(tile * scale, dtype=torch.float64)
        if span.start > 0:
            weight = weight.minimum(ramp)
        if span.stop < size:
            weight = weight.minimum(ramp.flip(0))
        weights.append(weight)
        total[span.start * scale : span.stop * scale] += weight
    weights = [w / total[s.start * scale : s.stop * scale] for s, w in zip(spans, weights)]
    return spans, [w.float() for w in weights]
