"""Tiles of a frame: windows that are decoded exactly, and overlapping tiles with weights to blend them.

All sides and spans are in latent pixels (8 pixels of an image each), unless a scale is named.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..refusal import Refusal
from .layers import Layer, Stage
from .past import Past

Window: TypeAlias = tuple[slice, slice]  # rows, columns


class Tile(NamedTuple):
    """A tile to blend with its neighbours.

    Attributes:
        ys, xs: rows and columns, in latent pixels.
        weight: [rows * scale, columns * scale]; the weights of all tiles add up to 1 everywhere.
    """

    ys: slice
    xs: slice
    weight: Tensor


def plan_tiles(h: int, w: int, tile_y: int, tile_x: int, overlap: int, scale: int) -> list[Tile]:
    """Overlapping tiles of one size that cover a frame, with weights that fall linearly where they overlap.

    Args:
        h, w: of the frame, in latent pixels (8 pixels of an image).
        tile_y, tile_x: of a tile; one larger than the frame is the whole frame.
        overlap: rows and columns that neighbours share; the last two of a row or column may share more.
        scale: blended values per latent pixel and axis, 8 for RGB and 1 for latents.

    Raises:
        Refusal: if the overlap leaves no step from one tile to the next.
    """
    sides = ((h, tile_y), (w, tile_x))
    if overlap < 0 or any(tile < 1 or overlap >= tile < side for side, tile in sides):
        raise Refusal(
            f"VAE tiles of {tile_x * 8} x {tile_y * 8} pixels with an overlap of {overlap * 8}: it must be "
            "at least 0 and smaller than a tile where there are several",
            "Set for example tiles of 256 and an overlap of 64",
        )
    rows = list(zip(*_cut(h, tile_y, overlap, scale)))
    columns = list(zip(*_cut(w, tile_x, overlap, scale)))
    return [Tile(ys, xs, wy[:, None] * wx) for ys, wy in rows for xs, wx in columns]


def _cut(size: int, tile: int, overlap: int, scale: int) -> tuple[list[slice], list[Tensor]]:
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


def cut_windows(h: int, w: int, tile_y: int, tile_x: int) -> list[Window]:
    """Windows of at most tile_y x tile_x that cover h x w without overlap.

    Raises:
        Refusal: if a side of the tile is below 1.
    """
    if min(tile_y, tile_x) < 1:
        raise Refusal(
            f"VAE tiles of {tile_x * 8} x {tile_y * 8} pixels: both sides must be at least 8",
            "Set for example 256",
        )
    return [*product(even_spans(h, tile_y), even_spans(w, tile_x))]


def even_spans(side: int, tile: int) -> list[slice]:
    """The fewest slices of at most `tile` that cover `side`; their lengths differ by at most 1."""
    return cut_evenly(side, math.ceil(side / tile))


def cut_evenly(side: int, count: int) -> list[slice]:
    """So many slices that cover `side`; their lengths differ by at most 1."""
    return [slice(side * i // count, side * (i + 1) // count) for i in range(count)]


def scaled(span: slice, factor: int) -> slice:
    """The same span of an axis with `factor` times the pixels."""
    return slice(span.start * factor, span.stop * factor)


def with_margin(span: slice, side: int, scale: int, margin: int) -> slice:
    """`span` of `side`, both times `scale`, with `margin` pixels more at each end where there are any."""
    return slice(max(0, span.start * scale - margin), min(side * scale, span.stop * scale + margin))


def growth(layers: Sequence[Layer]) -> int:
    """By how much a stage multiplies height and width."""
    return math.prod(layer.space for layer in layers)


def margins(stages: Sequence[Stage]) -> list[int]:
    """How many pixels around a window each stage reads, counted in the pixels of its input."""
    margin, found = 0, []
    for layers in reversed(stages):
        for layer in reversed(layers):
            margin = math.ceil((margin + layer.reach) / layer.space)
        found.append(margin)
    return found[::-1]


def frames_left_out(stages: Sequence[Stage], first: int) -> tuple[int, list[int]]:
    """How to compute the frames of a clip from frame `first` on, exactly, without all those before.

    The stages run on a clip that begins later. Its first frames lack the past that they had in the whole
    clip, so their results are dropped.

    Returns:
        (how many of the first input frames to leave out, how many of the first frames of each stage's
        result to drop)
    """
    starts = first_frames(stages, first)
    rates = [math.prod(layer.time for layer in layers) for layers in stages]
    drops = [wanted - int(start * rate) for start, rate, wanted in zip(starts, rates, starts[1:])]
    return starts[0], drops


def first_frames(stages: Sequence[Stage], first: int) -> list[int]:
    """The first frame that each stage reads for the result from frame `first` on; then `first` itself."""
    found = [first]
    for layers in reversed(stages):
        start = found[-1]
        for layer in reversed(layers):
            start = max(0, math.ceil(start / layer.time) - layer.reach_back)
        found.append(start)
    return found[::-1]


def windowed(stages: Sequence[Stage], window: Window, size: tuple[int, int]) -> tuple[Window, list[Stage]]:
    """Stages that compute one window of the result, exactly; each ends by cropping to what the next reads.

    Args:
        stages: local in space, as those of `Decoder.stages` but the first.
        window: of the first stage's whole input.
        size: height and width of that input.

    Returns:
        (the part of the input to give, the stages)
    """
    regions = needed_regions(stages, window, size)
    cropped = []
    for layers, given, wanted in zip(stages, regions, regions[1:]):
        have = [scaled(span, growth(layers)) for span in given]
        inside = [slice(w.start - h.start, w.stop - h.start) for w, h in zip(wanted, have)]
        cropped.append([*layers, Layer(partial(crop, *inside))])
    return regions[0], cropped


def needed_regions(stages: Sequence[Stage], window: Window, size: tuple[int, int]) -> list[Window]:
    """What each stage reads of its whole input for a window of the result; then that window itself.

    Each region is counted in the pixels of its own frame: `size` times what the stages before it grow.
    """
    scales = accumulate(map(growth, stages), operator.mul, initial=1)
    (rows, columns), (height, width) = window, size
    return [
        (with_margin(rows, height, scale, margin), with_margin(columns, width, scale, margin))
        for scale, margin in zip(scales, [*margins(stages), 0])
    ]


def crop(rows: slice, columns: slice, x: Tensor, past: Past) -> Tensor:
    """A layer that keeps part of the picture."""
    return x[..., rows, columns]
