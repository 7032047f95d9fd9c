"""A decode over several devices: each has a window of the frame, exact to its edge, and exchanges nothing.

What a window's layers read beyond it is computed again by each neighbour, which costs less than to wait for
it at every convolution; and a window that was lost is done again by anybody. `decode_within_memory` does one
window. A cut in time is of no use:
frames from 77 on still need nearly all that is before them (`frames_left_out`).
"""

from collections.abc import Sequence
from itertools import product

from . import WanVAE
from .layers import Layer
from .tiling import Window, cut_evenly, growth, needed_regions


def spread_windows(vae: WanVAE, h: int, w: int, devices: int) -> list[Window]:
    """A window for each device, cut so that the largest takes least; fewer where there are too few pixels.

    Args:
        vae: what decodes; its weights may be without data.
        h, w: of the latent.
        devices: at least 1.
    """
    grids = [(rows, devices // rows) for rows in range(1, devices + 1) if devices % rows == 0]
    cuts = [
        [*product(cut_evenly(h, min(rows, h)), cut_evenly(w, min(columns, w)))] for rows, columns in grids
    ]
    return min(cuts, key=lambda windows: largest_share(vae, h, w, windows))


def largest_share(vae: WanVAE, h: int, w: int, windows: Sequence[Window]) -> float:
    """What the largest of the windows takes of the work of a decode of whole frames."""
    whole = _work(vae, h, w, (slice(0, h), slice(0, w)))
    return max(_work(vae, h, w, window) for window in windows) / whole


def _work(vae: WanVAE, h: int, w: int, window: Window) -> float:
    """Products a latent frame: of the layers that read whole frames, and of a window in those after them."""
    first, *local = vae.decoder.stages()
    total, rate = _products(first) * h * w, 1.0
    for layers, (rows, columns) in zip(local, needed_regions(local, window, (h, w))):
        pixels = (rows.stop - rows.start) * (columns.stop - columns.start) * growth(layers) ** 2
        for layer in layers:
            total += rate * _products([layer]) * pixels
            rate *= layer.time
    return total


def _products(layers: list[Layer]) -> int:
    """A pixel of a frame, in the convolutions in time and space, which are nearly all there is."""
    return sum(conv.weight.numel() for layer in layers for conv in layer.convs)
