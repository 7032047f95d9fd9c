"""A decode that goes on in less memory when memory runs out: smaller tiles, then the CPU.

What is decoded stays. The rest begins at the first missing frame, with just enough of the past before it
(`frames_left_out`) to give the frames of an undisturbed decode.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..out_of_memory import is_out_of_memory
from . import Progress, WanVAE, report
from .past import Check
from .tiling import Window, cut_windows

TILES = (512, 256, 128, 64)  # pixels, after whole frames


class Piece(NamedTuple):
    """A part of a batch of clips that is yet to be decoded.

    Attributes:
        sample: index of the clip.
        rows, columns: in latent pixels.
        first: the first pixel frame that is missing.
    """

    sample: int
    rows: slice
    columns: slice
    first: int

    @property
    def area(self) -> int:
        """Latent pixels."""
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def pixels(self, origin: tuple[int, int]) -> Window:
        """Rows and columns of the image, in a picture that begins at this latent row and column."""
        spans = zip((self.rows, self.columns), origin)
        rows, columns = (slice(8 * (span.start - at), 8 * (span.stop - at)) for span, at in spans)
        return rows, columns

    def cut(self, tile: int | None) -> "list[Piece]":
        """Pieces of at most `tile` x `tile` image pixels; None and 0 leave it whole."""
        if not tile:
            return [self]
        y, x = self.rows.start, self.columns.start
        windows = cut_windows(self.rows.stop - y, self.columns.stop - x, tile // 8, tile // 8)
        return [
            self._replace(
                rows=slice(y + rows.start, y + rows.stop), columns=slice(x + columns.start, x + columns.stop)
            )
            for rows, columns in windows
        ]


def decode_within_memory(
    vae: WanVAE,
    z: Tensor,
    out: Tensor,
    tile: int | None = None,
    retreat: Callable[[str], object] | None = None,
    last_resort: Callable[[], WanVAE] | None = None,
    progress: Progress | None = None,
    check: Check | None = None,
    window: Window | None = None,
) -> None:
    """`WanVAE.decode` into `out`, in whole frames or tiles, going on in less memory where that runs out.

    Args:
        vae: decodes, until memory runs out in the smallest tiles.
        z: [B, z_dim, T, H/8, W/8], as for its `decode`; clips of a batch are decoded one by one.
        out: [B, 3, F, H, W] of the window, on any device.
        tile: pixels, a multiple of 8, to begin with; None or 0 is whole frames.
        retreat: called with one sentence before the decode goes on; frees what can be freed.
        last_resort: called when the smallest tiles do not fit; gives the VAE to go on with, maybe on another
            device. None if there is no such VAE.
        progress: called as progress(done, total) with pixel frames; may raise.
        check: as for `decode`.
        window: rows and columns of the frame to decode, in latent pixels; None is all of it.

    Raises:
        Exception: any that is not for lack of memory, or the last for lack of it.
    """
    rows, columns = window or (slice(0, z.shape[-2]), slice(0, z.shape[-1]))
    retreat = retreat or (lambda sentence: None)
    left = [Piece(i, rows, columns, 0) for i in range(z.shape[0])]
    sizes = [tile, *smaller_tiles(tile, *(side // 8 for side in out.shape[-2:]))]
    for size, smaller in zip(sizes, [*sizes[1:], None]):
        pieces = [part for piece in left for part in piece.cut(size)]
        may_fail = smaller is not None or last_resort is not None
        remaining = _decode(vae, z, out, pieces, may_fail, progress, check, (rows.start, columns.start))
        if not remaining:
            return
        if remaining != pieces:  # else no frame came out: what is left stays in the larger pieces it was
            left = remaining
        how = "on the CPU" if smaller is None else f"in tiles of {smaller} pixels"
        retreat(f"out of memory with {_percent_done(left, out)} % decoded, which stay; it goes on {how}")
    assert last_resort is not None  # without one, the smallest tiles have raised
    vae = last_resort()
    _decode(vae, z.to(vae.conv2.weight), out, left, False, progress, check, (rows.start, columns.start))


def smaller_tiles(tile: int | None, h: int, w: int) -> list[int]:
    """Sizes in pixels to go on with after tiles of `tile`, or after whole frames of h x w latent pixels."""
    return [size for size in TILES if size < (tile or 8 * max(h, w))]


def _decode(
    vae: WanVAE,
    z: Tensor,
    out: Tensor,
    pieces: Sequence[Piece],
    may_fail: bool,
    progress: Progress | None,
    check: Check | None,
    origin: tuple[int, int],
) -> list[Piece]:
    """Decodes piece after piece; gives those that are left when memory runs out, which it then may.

    Args:
        origin: row and column of the frame, in latent pixels, at which `out` begins.
    """
    left = deque(pieces)
    h, w = z.shape[-2:]
    total, area = len(out) * out.shape[2], out.shape[-2] * out.shape[-1] // 64
    features, held = None, None
    try:
        while left:
            piece = left[0]
            clip = z[piece.sample : piece.sample + 1]
            window = None if piece.area == h * w else (piece.rows, piece.columns)
            if window is not None and held != piece.sample:
                features, held = vae.features(clip, out.device, check), piece.sample
            place = out[(piece.sample, ..., *piece.pixels(origin))]
            for f, chunk in vae.decode_part(clip, window, features, piece.first, check=check):
                place[:, f : f + chunk.shape[2]] = chunk[0]
                left[0] = piece._replace(first=f + chunk.shape[2])
                report(progress, total - math.ceil(_missing(left, out) / area), total)
            left.popleft()
    except Exception as error:
        if not may_fail or not is_out_of_memory(error):
            raise
    return list(left)


def _missing(pieces: Sequence[Piece], out: Tensor) -> int:
    """What is yet to be decoded, in latent pixels times pixel frames."""
    return sum((out.shape[2] - piece.first) * piece.area for piece in pieces)


def _percent_done(left: Sequence[Piece], out: Tensor) -> str:
    b, _, frames, height, width = out.shape
    return f"{100 - 100 * _missing(left, out) * 64 / (b * frames * height * width):.0f}"


def on_cpu(vae: WanVAE) -> WanVAE:
    """The same VAE in float32 on the CPU, with plain layers."""
    twin = WanVAE(vae.dim, vae.z_dim, device="meta", dtype=torch.float32)
    weights = {name: tensor.to("cpu", torch.float32) for name, tensor in vae.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    return twin.eval().requires_grad_(False)
