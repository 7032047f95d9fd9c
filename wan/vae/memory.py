"""How much memory an encode or a decode takes on its device beyond the weights, before it is tried.

Most of it is what causal layers keep: two frames of every convolution that looks back in time, at its own
resolution. It is counted from the layers. The rest is one chunk under way at the widest place, in units of
that chunk.
"""

from .cpu import STRIP_BYTES
from .fallback import TILES
from .stream import frames_per_chunk
from .tiling import even_spans, growth, margins, with_margin

# Chunks alive at once in a residual block: its input, the normed copy, that joined to the two frames before
# it (twice a chunk of two), the result, and on CUDA what the library's convolution takes for itself, at most
# its input and result in another layout. On the CPU the strips of cpu.py take their place.
CHUNKS_ALIVE = {"cpu": 5, "cuda": 8}
SAFETY = 1.1


def decode_bytes(vae, h, w, device, tile=None, itemsize=None, held_frames=0):
    """Bytes that decoding one clip takes on `device` beyond weights, latent and result.

    Args:
        vae: The WanVAE.
        h, w: Of the latent.
        device: Where it is decoded.
        tile: Pixels; None or 0 is whole frames.
        itemsize: Bytes of a number; None is that of the weights.
        held_frames: Latent frames whose features tiles hold on `device`; 0 where the result, and so they,
            lie elsewhere.
    """
    itemsize = itemsize or vae.conv2.weight.element_size()
    chunk = frames_per_chunk(None, device)
    alive = CHUNKS_ALIVE.get(device.type, CHUNKS_ALIVE["cuda"])
    whole, *local = vae.decoder.stages()
    kept, widest, scale = kept_values(whole) * h * w, 0, 1
    for layers, margin in zip(local, margins(local)):
        rows, columns = (longest(side, tile, scale, margin) for side in (h, w))
        scale *= growth(layers)
        pixels = rows * columns * growth(layers) ** 2
        kept += kept_values(layers) * pixels
        widest = max(widest, width(layers) * pixels * chunk)
    held = vae.decoder.conv1.out_channels * held_frames * h * w if tile else 0
    strips = 2 * STRIP_BYTES if device.type == "cpu" else 0
    return strips + int(SAFETY * itemsize * (kept + alive * widest)) + itemsize * held


def encode_bytes(vae, frames, h, w, device, itemsize=None):
    """Bytes that encoding one clip takes on `device` beyond weights, pixels and result.

    Args:
        vae: The WanVAE.
        frames, h, w: Of the pixels.
        device: Where it is encoded.
        itemsize: Bytes of a number; None is that of the weights.
    """
    itemsize = itemsize or vae.conv2.weight.element_size()
    chunk = frames_per_chunk(None, device)
    alive = CHUNKS_ALIVE.get(device.type, CHUNKS_ALIVE["cuda"])
    kept, widest, pixels = 0, 0, h * w
    for layers in vae.encoder.stages():
        kept += kept_values(layers, frames) * pixels
        widest = max(widest, width(layers) * pixels * min(chunk, frames))
        pixels //= 4
        if layers[0].time == 0.5:
            frames = (frames + 1) // 2
    strips = 2 * STRIP_BYTES if device.type == "cpu" else 0
    return strips + int(SAFETY * itemsize * (kept + alive * widest))


def longest(side, tile, scale, margin):
    """Pixels of the longest piece of a latent side, with its margins; tile in pixels, None or 0 is whole."""
    spans = even_spans(side, tile // 8 if tile else side)
    pieces = [with_margin(span, side, scale, margin) for span in spans]
    return max(piece.stop - piece.start for piece in pieces)


def choose_tile(vae, h, w, device, free_bytes, itemsize=None, held_frames=0):
    """None for whole frames, or the largest tile (pixels) whose decode fits into `free_bytes`.

    Where none fits it is the smallest. The other arguments are those of `decode_bytes`.
    """
    for tile in (None, *TILES):
        if decode_bytes(vae, h, w, device, tile, itemsize, held_frames) <= free_bytes:
            return tile
    return TILES[-1]


def kept_values(layers, frames=2):
    """Numbers per pixel that the layers keep between chunks, of a clip of so many frames."""
    return sum(
        min(conv.kernel_size[0] - 1, frames) * conv.in_channels for layer in layers for conv in layer.convs
    )


def width(layers):
    return max(conv.in_channels for layer in layers for conv in layer.convs)
