"""How much memory an encode or a decode takes on its device beyond the weights, before it is tried.

Most of it is what causal layers keep: two frames of every convolution that looks back in time, at its own
resolution. It is counted from the layers. The rest is one chunk under way at the widest place, in units of
that chunk.

Sides are in latent pixels where they are h and w of a decode, else in pixels of the tensor at hand.
"""

from collections.abc import Sequence

import torch

from . import WanVAE
from .cpu import STRIP_BYTES
from .cuda import suits
from .fallback import TILES
from .layers import Layer
from .stream import frames_per_chunk
from .tiling import Window, even_spans, growth, margins, with_margin

# Chunks alive at once in a residual block: its input, the normed copy, that joined to the two frames before
# it (twice a chunk of two), the result, and on CUDA what the library's convolution takes for itself, at most
# its input and result in another layout. On the CPU the strips of cpu.py take their place. Where channels lie
# last (cuda.py) it is three, and two frames before one of them.
CHUNKS_ALIVE = {"cpu": 5, "cuda": 8}
CHUNKS_CHANNELS_LAST, FRAMES_BEFORE = 3, 2
LONG_CHUNK = (
    4  # frames, on CUDA where there is room: joining the two before costs less, and kernels run longer
)
# Without cuDNN a convolution of 3x3x3 first writes out what each of its taps reads. The host turns it off on
# AMD's newer cards, where the name stands for MIOpen.
COLUMNS = 27
SAFETY = 1.1


def decode_bytes(
    vae: WanVAE,
    h: int,
    w: int,
    device: torch.device,
    tile: int | None = None,
    itemsize: int | None = None,
    held_frames: int = 0,
    window: Window | None = None,
    chunk_frames: int | None = None,
) -> int:
    """Bytes that decoding one clip takes on `device` beyond weights, latent and result.

    Args:
        vae: what decodes; its weights may be without data.
        h, w: of the latent.
        device: where it is decoded.
        tile: pixels; None or 0 is whole frames.
        itemsize: bytes of a number; None is that of the weights.
        held_frames: latent frames whose features are held on `device` for tiles; 0 where the result, and so
            they, lie elsewhere.
        window: rows and columns, in latent pixels, of what alone is decoded; None is all of it.
        chunk_frames: as for `WanVAE.decode`.
    """
    itemsize = itemsize or vae.conv2.weight.element_size()
    chunk = frames_per_chunk(chunk_frames, device)
    alive = _frames_alive(chunk, itemsize, device)
    if suits(device, itemsize):
        alive += chunk  # second halves of what was doubled in time, which wait for the first at each level
    whole, *local = vae.decoder.stages()
    kept, widest, scale = kept_values(whole) * h * w, 0, 1
    sides = [(side, span or slice(0, side)) for side, span in zip((h, w), window or (None, None))]
    for layers, margin in zip(local, margins(local)):
        rows, columns = (longest(side, tile, scale, margin, span) for side, span in sides)
        scale *= growth(layers)
        pixels = rows * columns * growth(layers) ** 2
        kept += kept_values(layers) * pixels
        widest = max(widest, width(layers) * pixels)
    held = vae.decoder.conv1.out_channels * held_frames * h * w if tile else 0
    return _bytes(kept, alive * widest, itemsize, device) + itemsize * held


def encode_bytes(
    vae: WanVAE,
    frames: int,
    h: int,
    w: int,
    device: torch.device,
    itemsize: int | None = None,
    chunk_frames: int | None = None,
) -> int:
    """Bytes that encoding one clip takes on `device` beyond weights, pixels and result.

    Args:
        vae: what encodes; its weights may be without data.
        frames, h, w: of the pixels.
        device: where it is encoded.
        itemsize: bytes of a number; None is that of the weights.
        chunk_frames: as for `WanVAE.encode`.
    """
    itemsize = itemsize or vae.conv1.weight.element_size()
    chunk = frames_per_chunk(chunk_frames, device)
    kept, widest, pixels = 0, 0, h * w
    for layers in vae.encoder.stages():
        kept += kept_values(layers, frames) * pixels
        widest = max(widest, width(layers) * pixels * _frames_alive(min(chunk, frames), itemsize, device))
        pixels //= 4
        if layers[0].time == 0.5:
            frames = (frames + 1) // 2
    return _bytes(kept, widest, itemsize, device)


def choose_tile(
    vae: WanVAE,
    h: int,
    w: int,
    device: torch.device,
    free_bytes: int,
    itemsize: int | None = None,
    held_frames: int = 0,
    window: Window | None = None,
) -> int | None:
    """None for whole frames, or the largest tile (pixels) whose decode fits into `free_bytes`.

    Where none fits it is the smallest. The other arguments are those of `decode_bytes`.
    """
    for tile in (None, *TILES):
        if decode_bytes(vae, h, w, device, tile, itemsize, held_frames, window) <= free_bytes:
            return tile
    return TILES[-1]


def longest(side: int, tile: int | None, scale: int, margin: int, within: slice) -> int:
    """Pixels of the longest piece of a part of a latent side at `scale`, with margins.

    Args:
        side: latent pixels.
        within: the part, in latent pixels.
        tile: image pixels; None or 0 is the whole side.
        scale, margin: as for `with_margin`.
    """
    size, start = within.stop - within.start, within.start
    spans = even_spans(size, tile // 8 if tile else size)
    pieces = [
        with_margin(slice(start + span.start, start + span.stop), side, scale, margin) for span in spans
    ]
    return max(piece.stop - piece.start for piece in pieces)


def kept_values(layers: Sequence[Layer], frames: int = 2) -> int:
    """Numbers per pixel that the layers keep between chunks, of a clip of so many frames."""
    return sum(
        min(conv.kernel_size[0] - 1, frames) * conv.in_channels for layer in layers for conv in layer.convs
    )


def width(layers: Sequence[Layer]) -> int:
    """Channels at the widest place."""
    return max(conv.in_channels for layer in layers for conv in layer.convs)


def _frames_alive(chunk: int, itemsize: int, device: torch.device) -> int:
    """Frames alive at once in a residual block that works on chunks of so many."""
    if suits(device, itemsize):
        return CHUNKS_CHANNELS_LAST * chunk + FRAMES_BEFORE
    alive = CHUNKS_ALIVE.get(device.type, CHUNKS_ALIVE["cuda"])
    if device.type == "cuda" and not torch.backends.cudnn.enabled:
        alive += COLUMNS
    return alive * chunk


def _bytes(kept: int, alive: int, itemsize: int, device: torch.device) -> int:
    """Of the numbers kept between chunks, and of those alive at the widest place."""
    strips = 2 * STRIP_BYTES if device.type == "cpu" else 0
    return strips + int(SAFETY * itemsize * (kept + alive))
