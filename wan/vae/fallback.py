"""A decode that goes on in less memory when memory runs out: smaller tiles, then the CPU.

What is decoded stays. The rest begins at the first missing frame, with just enough of the past before it
(`frames_left_out`) to give the frames of an undisturbed decode.
"""

from collections import deque
from typing import NamedTuple

import torch

from . import WanVAE, report
from .tiling import cut_windows, scaled

TILES = (512, 256, 128, 64)  # pixels, after whole frames


class Piece(NamedTuple):
    """A part of a batch of clips that is yet to be decoded, from one frame on."""

    sample: int
    rows: slice  # latent pixels
    columns: slice
    first: int  # pixel frame

    @property
    def area(self):
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start)

    def cut(self, tile):
        """Pieces of at most `tile` x `tile` pixels; None and 0 leave it whole."""
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


def decode_within_memory(vae, z, out, tile=None, retreat=None, last_resort=None, progress=None, check=None):
    """`WanVAE.decode` into `out`, in whole frames or tiles, going on in less memory where that runs out.

    Args:
        vae, z, out: The WanVAE, and as for its `decode`; clips of a batch are decoded one by one.
        tile: Pixels, a multiple of 8, to begin with; None or 0 is whole frames.
        retreat: Called with one sentence before the decode goes on; frees what can be freed.
        last_resort: Called when the smallest tiles do not fit; gives the VAE to go on with, on another device
            maybe. None is no such VAE.
        progress: Called as progress(done, total) with pixel frames; may raise.
        check: As for `decode`.

    Raises:
        Exception: Any that is not for lack of memory, or the last for lack of it.
    """
    h, w = z.shape[-2:]
    left = [Piece(i, slice(0, h), slice(0, w), 0) for i in range(z.shape[0])]
    tiles = [tile, *smaller_tiles(tile, h, w)]
    while left:
        if tiles:
            size = tiles.pop(0)
            pieces = [part for piece in left for part in piece.cut(size)]
        else:
            vae, last_resort, pieces = last_resort(), None, left
            z = z.to(vae.conv2.weight)
        may_fail = bool(tiles) or last_resort is not None
        remaining = _decode(vae, z, out, pieces, may_fail, progress, check)
        if remaining != pieces:  # else no frame came out, and the pieces stay as large as they were
            left = remaining
        if left and retreat is not None:
            retreat(_next_step(left, out, tiles))


def smaller_tiles(tile, h, w):
    """Sizes to go on with after `tile` pixels, or after whole frames of h x w latent pixels."""
    return [size for size in TILES if size < (tile or 8 * max(h, w))]


def _decode(vae, z, out, pieces, may_fail, progress, check):
    """Decodes piece after piece; returns those that are left when memory runs out."""
    left = deque(pieces)
    h, w = z.shape[-2:]
    count, frames = len(out), out.shape[2]
    features, held = None, None
    try:
        while left:
            piece = left[0]
            clip = z[piece.sample : piece.sample + 1]
            window = None if piece.area == h * w else (piece.rows, piece.columns)
            if window is not None and held != piece.sample:
                features, held = vae.features(clip, out.device, check), piece.sample
            place = out[piece.sample, :, :, scaled(piece.rows, 8), scaled(piece.columns, 8)]
            for f, chunk in vae.decode_part(clip, window, features, piece.first, check=check):
                place[:, f : f + chunk.shape[2]] = chunk[0]
                left[0] = piece._replace(first=f + chunk.shape[2])
                report(progress, count * frames - -(-_missing(left, frames) // (h * w)), count * frames)
            left.popleft()
    except Exception as error:
        if not may_fail or not is_out_of_memory(error):
            raise
    return list(left)


def _missing(pieces, frames):
    """Latent pixels times pixel frames."""
    return sum((frames - piece.first) * piece.area for piece in pieces)


def _next_step(left, out, tiles):
    b, _, frames, height, width = out.shape
    done = 100 - 100 * _missing(left, frames) * 64 / (b * frames * height * width)
    how = f"in tiles of {tiles[0]} pixels" if tiles else "on the CPU"
    return f"out of memory with {done:.0f} % decoded, which stay; it goes on {how}"


# What PyTorch says on the CPU, and what cuDNN and cuBLAS say when there is no room for their workspace.
OUT_OF_MEMORY = ("out of memory", "defaultcpuallocator", "unable to find an engine", "status_alloc_failed")


def is_out_of_memory(error):
    """Whether PyTorch, on any device, had no memory to give."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)
    )


def on_cpu(vae):
    """The same VAE in float32 on the CPU, with plain layers."""
    twin = WanVAE(vae.dim, vae.z_dim, device="meta", dtype=torch.float32)
    weights = {name: tensor.to("cpu", torch.float32) for name, tensor in vae.state_dict().items()}
    twin.load_state_dict(weights, assign=True)
    return twin.eval().requires_grad_(False)
