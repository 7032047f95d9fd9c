"""A decode that goes on in less memory when memory runs out: smaller tiles, then the CPU.

What is decoded stays. The rest begins at the first missing frame, with just enough of the past before it
(`frames_left_out`) to give the frames of an undisturbed decode.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..out_of_memory import is_out_of_memory
from . import Progress, WanVAE, report
from .past import Check
from .tiling import Window, cut_windows

TILES = (512, 256, 128, 64)  # pixels, after whole frames
T = TypeVar("T")


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
    chunk_frames: int | None = None,
) -> None:
    """`WanVAE.decode` into `out`, in whole frames or tiles, going on in less memory where that runs out.

    Args:
        vae, z, tile, retreat, last_resort, check, window, chunk_frames: as for `decode_pieces`.
        out: [B, 3, F, H, W] of the window, on any device.
        progress: called as progress(done, total) with pixel frames; may raise.

    Raises:
        Exception: any that is not for lack of memory, or the last for lack of it.
    """
    window = window or _whole(z)
    origin = (window[0].start, window[1].start)
    total, area, done = len(out) * out.shape[2], out.shape[-2] * out.shape[-1] // 64, 0

    def put(piece: Piece, pixels: Tensor) -> int:
        place = out[(piece.sample, ..., *piece.pixels(origin))]
        place[:, piece.first : piece.first + pixels.shape[1]] = pixels
        return piece.area * pixels.shape[1]

    how = Retreat(out.device, retreat, last_resort, chunk_frames)
    for part in decode_pieces(vae, z, put, tile, how, check, window):
        done += part
        report(progress, total - math.ceil((total * area - done) / area), total)


class Retreat(NamedTuple):
    """What a decode may do when memory runs out.

    Attributes:
        device: where to keep features of whole frames, for tiles.
        say: called with one sentence before the decode goes on; frees what can be freed.
        last_resort: called when the smallest tiles do not fit; gives the VAE to go on with, maybe on another
            device. None if there is no such VAE.
        chunk_frames: as for `WanVAE.decode`, until memory runs out.
    """

    device: torch.device
    say: Callable[[str], object] | None = None
    last_resort: Callable[[], WanVAE] | None = None
    chunk_frames: int | None = None


def decode_pieces(
    vae: WanVAE,
    z: Tensor,
    put: Callable[[Piece, Tensor], T],
    tile: int | None,
    retreat: Retreat,
    check: Check | None = None,
    window: Window | None = None,
) -> Iterator[T]:
    """`WanVAE.decode` piece by piece, each handed to `put` with its pixels [3, f, H, W].

    Args:
        vae: decodes, until memory runs out in the smallest tiles.
        z: [B, z_dim, T, H/8, W/8], as for its `decode`; clips of a batch are decoded one by one.
        put: takes what is decoded; where it runs out of memory, that is decoded again.
        tile: pixels, a multiple of 8, to begin with; None or 0 is whole frames.
        retreat: what to do when memory runs out.
        check: as for `decode`.
        window: rows and columns of the frame to decode, in latent pixels; None is all of it.

    Yields:
        What `put` gives.

    Raises:
        Exception: any that is not for lack of memory, or the last for lack of it.
    """
    device, say, last_resort, chunk_frames = retreat
    window = window or _whole(z)
    left = [Piece(i, *window, 0) for i in range(z.shape[0])]
    whole, frames = sum(piece.area for piece in left), vae.decode_output_shape(z.shape)[2]
    sizes = [tile, *smaller_tiles(tile, *(span.stop - span.start for span in window))]
    for size, smaller in zip(sizes, [*sizes[1:], None]):
        pieces = [part for piece in left for part in piece.cut(size)]
        may_fail = smaller is not None or last_resort is not None
        remaining = yield from _decode(vae, z, put, pieces, may_fail, device, check, chunk_frames)
        chunk_frames = None
        if not remaining:
            return
        if remaining != pieces:  # else no frame came out: what is left stays in the larger pieces it was
            left = remaining
        how = "on the CPU" if smaller is None else f"in tiles of {smaller} pixels"
        missing = sum((frames - piece.first) * piece.area for piece in left)
        if say is not None:
            percent = 100 - 100 * missing / (whole * frames)
            say(f"out of memory with {percent:.0f} % decoded, which stay; it goes on {how}")
    assert last_resort is not None  # without one, the smallest tiles have raised
    vae = last_resort()
    yield from _decode(vae, z.to(vae.conv2.weight), put, left, False, device, check)


def _whole(z: Tensor) -> Window:
    return slice(0, z.shape[-2]), slice(0, z.shape[-1])


def smaller_tiles(tile: int | None, h: int, w: int) -> list[int]:
    """Sizes in pixels to go on with after tiles of `tile`, or after whole frames of h x w latent pixels."""
    return [size for size in TILES if size < (tile or 8 * max(h, w))]


def _decode(
    vae: WanVAE,
    z: Tensor,
    put: Callable[[Piece, Tensor], T],
    pieces: Sequence[Piece],
    may_fail: bool,
    device: torch.device,
    check: Check | None,
    chunk_frames: int | None = None,
) -> Generator[T, None, list[Piece]]:
    """Decodes piece after piece; returns those that are left when memory runs out, which it then may."""
    left = deque(pieces)
    h, w = z.shape[-2:]
    features, held = None, None
    try:
        while left:
            piece = left[0]
            clip = z[piece.sample : piece.sample + 1]
            window = None if piece.area == h * w else (piece.rows, piece.columns)
            if window is not None and held != piece.sample:
                features, held = vae.features(clip, device, check), piece.sample
            for f, chunk in vae.decode_part(clip, window, features, piece.first, chunk_frames, check):
                done = put(piece._replace(first=f), chunk[0])
                left[0] = piece._replace(first=f + chunk.shape[2])
                yield done
            left.popleft()
    except Exception as error:
        if not may_fail or not is_out_of_memory(error):
            raise
    return list(left)


def on_cpu(vae: WanVAE) -> WanVAE:
    """The same VAE in float32 on the CPU, with plain layers."""
    twin = WanVAE(vae.dim, vae.z_dim, device="meta", dtype=torch.float32)
    weights = {name: tensor.to("cpu", torch.float32) for name, tensor in vae.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    return twin.eval().requires_grad_(False)
