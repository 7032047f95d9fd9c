"""Tiles of a frame: windows that are decoded exactly, and overlapping tiles with weights to blend them.

h, w: latent height and width; scale: blended values per latent pixel, 8 for RGB and 1 for latents.
"""

import math
from functools import partial
from itertools import product
from typing import NamedTuple

import torch

from .layers import Layer


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


def cut_windows(h, w, tile_y, tile_x):
    """(rows, columns) of windows that cover h x w latent pixels once, each at most tile_y x tile_x.

    Raises:
        ValueError: If a side of the tile is below 1.
    """
    if min(tile_y, tile_x) < 1:
        raise ValueError(
            f"VAE tiles of {tile_x} x {tile_y} latent pixels: both must be at least 1, for example 32."
        )
    return [*product(even_spans(h, tile_y), even_spans(w, tile_x))]


def even_spans(side, tile):
    """As few slices of at most `tile` as cover `side`, all as long as each other to 1."""
    count = -(-side // tile)
    return [slice(side * i // count, side * (i + 1) // count) for i in range(count)]


def with_margin(span, side, scale, margin):
    """A span scaled, and widened by `margin` as far as the scaled side goes."""
    return slice(max(0, span.start * scale - margin), min(side * scale, span.stop * scale + margin))


def margins(stages):
    """How many pixels around a window the input of each stage must have, counted in that input."""
    needed, found = 0, []
    for layers in reversed(stages):
        for layer in reversed(layers):
            needed = -(-(needed + layer.reach) // layer.space)
        found.append(needed)
    return found[::-1]


def frames_left_out(stages, first):
    """What to leave out so that the stages yield the frames of a whole clip from frame `first` on, exactly.

    The stages then run on a clip that begins later, and the frames that miss their past go.

    Args:
        stages: Lists of layers with a `reach_back`.

    Returns:
        (how many of the first input frames are not needed, how many first frames of each stage's result to
        drop)
    """
    needed, starts = first, []
    for layers in reversed(stages):
        for layer in reversed(layers):
            needed = max(0, -(-needed // layer.time) - layer.reach_back)
        starts.append(needed)
    starts.reverse()
    results = [start * math.prod(layer.time for layer in layers) for start, layers in zip(starts, stages)]
    return starts[0], [after - result for after, result in zip([*starts[1:], first], results)]


def windowed(stages, window, size):
    """Stages that compute one window of the result, exactly: between them the borders no longer needed go.

    Args:
        stages: Lists of layers with a `reach`, as of `Decoder.stages` without the first.
        window: (rows, columns) as slices of `size`, the (height, width) of the first stage's whole input.

    Returns:
        (rows and columns of the input to give, the stages)
    """
    scale, have, start, result = 1, None, None, []
    for layers, margin in zip([*stages, None], [*margins(stages), 0]):
        want = [with_margin(span, side, scale, margin) for span, side in zip(window, size)]
        if have is None:
            start = want
        else:
            inside = [slice(w.start - h.start, w.stop - h.start) for w, h in zip(want, have)]
            result[-1].append(Layer(partial(crop, *inside)))
        if layers is not None:
            result.append([*layers])
            factor = layers[0].space
            scale *= factor
            have = [slice(span.start * factor, span.stop * factor) for span in want]
    return start, result


def crop(rows, columns, x, past):
    """A layer that keeps part of the picture."""
    return x[..., rows, columns]
