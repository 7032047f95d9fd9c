"""More pixels and more frames: Lanczos and tiles in space, and the plan of what to interpolate in time.

Shapes: images [F, H, W, C] in [0, 1], as the host hands them; planes (B, C, H, W).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

LANCZOS_LOBES = 3
LANCZOS_BLOCK = 64  # outputs of one matrix product: short enough to skip most of the zeros
SSIM_SIDE = 32  # pixels a frame is shrunk to before its content is compared
SCENE_CUT = 0.8  # content change, 1 - SSIM, above which two frames are a cut
STALL = 0.1  # a pair that changes less than this share of its neighbours is a duplicated frame


def even_side(side, scale):
    """Return `side * scale` rounded to the nearest even number of pixels, half upwards."""
    return 2 * math.floor(side * scale / 2 + 0.5)


def lanczos_weights(size_in, size_out, device=None):
    """Return the matrix (size_out, size_in) that resizes a line of pixels, float32.

    Lanczos with three lobes, antialiased when it shrinks; taps beyond the border are left out and the
    rest normalised, as in Pillow's Resample.c.
    """
    scale = size_in / size_out
    center = (torch.arange(size_out, dtype=torch.float64) + 0.5) * scale
    x = (torch.arange(size_in, dtype=torch.float64) + 0.5 - center[:, None]) / max(scale, 1.0)
    weights = torch.sinc(x) * torch.sinc(x / LANCZOS_LOBES) * (x.abs() < LANCZOS_LOBES)
    return (weights / weights.sum(dim=1, keepdim=True)).to(device, torch.float32)


def lanczos(x, height, width):
    """Resize planes with Lanczos, rows first.

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


def tile_spans(length, tile, overlap):
    """Cut a side into tiles that overlap.

    Args:
        length: of the side; tile: of a tile, at most used whole; overlap: least pixels two tiles share.

    Returns:
        A list of (first, weights): where each tile starts and its share (its size,) of every pixel. Shares
        fall linearly where tiles overlap and add up to 1.
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


def upscale_tiled(upscale, x, scale, tile, overlap, on_tile=lambda: None):
    """Run an upscaler over overlapping tiles.

    Args:
        upscale: (B, 3, h, w) -> (B, 3, h * scale, w * scale).
        x: (B, 3, H, W) float32 in [0, 1].
        scale: of the upscaler, an integer.
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


@dataclass(frozen=True)
class Span:
    """Two frames between which new ones go.

    Attributes:
        first, last: indices of the frames; two apart where the one between is a duplicate.
        cut: whether they belong to different scenes.
    """

    first: int
    last: int
    cut: bool = False

    def times(self, multiplier):
        """Return the places of the new frames in (0, 1), 0 being `first` and 1 `last`."""
        count = (self.last - self.first) * multiplier
        return [k / count for k in range(1, count)]


def frame_changes(images, on_frame=lambda i: None):
    """Compare each frame with the next.

    Args:
        images: [F, H, W, 3] in [0, 1].
        on_frame: called with the index of each pair before it is compared.

    Returns:
        Two lists of F - 1: the change of content, 1 - SSIM of the frames shrunk to 32x32 (in [0, 2]), and
        the mean absolute difference of their pixels.
    """
    content, pixels = [], []
    last = _shrunk(images[0])
    for i in range(len(images) - 1):
        on_frame(i)
        here = _shrunk(images[i + 1])
        content.append(1 - _ssim(last, here))
        pixels.append((images[i + 1].float() - images[i].float()).abs().mean().item())
        last = here
    return content, pixels


def _shrunk(frame):
    """[H, W, 3] -> (3, 32, 32), area average."""
    return F.adaptive_avg_pool2d(frame.float().permute(2, 0, 1), SSIM_SIDE)


def _ssim(a, b):
    """Structural similarity of (3, 32, 32) in [0, 1]: Wang et al. 2004, 11x11 Gaussian window of 1.5."""
    at = torch.arange(11, dtype=torch.float32, device=a.device) - 5
    line = torch.exp(-at.square() / (2 * 1.5**2))
    window = torch.outer(line, line).div_(line.sum() ** 2)[None, None]
    moments = torch.cat([a, b, a * a, b * b, a * b])[:, None]
    ma, mb, aa, bb, ab = F.conv2d(moments, window).chunk(5)
    c1, c2 = 0.01**2, 0.03**2
    variances = (aa - ma * ma) + (bb - mb * mb)
    similarity = (2 * ma * mb + c1) * (2 * (ab - ma * mb) + c2)
    return (similarity / ((ma * ma + mb * mb + c1) * (variances + c2))).mean().item()


def plan_spans(content, pixels, scene_cut=SCENE_CUT):
    """Decide what lies between the frames: motion, a cut, or a duplicate to bridge.

    A frame that stands still amid motion (it differs from the frame before by less than a tenth of what the
    neighbouring pairs do) is a duplicate: the span leads from the frame before it to the frame after it.
    Longer holds are kept, and so is a frame before a cut or at the end.

    Args:
        content, pixels: from `frame_changes`.
        scene_cut: change of content above which two frames are a cut; 1 or more finds none.

    Returns:
        A list of `Span`, from the first frame to the last.
    """
    spans, i = [], 0
    while i < len(content):
        cut = _is_cut(content[i], scene_cut)
        bridged = not cut and _stalls(pixels, i) and not _is_cut(content[i + 1], scene_cut)
        spans.append(Span(i, i + 1 + bridged, cut))
        i = spans[-1].last
    return spans


def _is_cut(change, scene_cut):
    return scene_cut < 1 and change > scene_cut


def _stalls(pixels, i):
    """Whether pair i stands still, its neighbours move, and there is a pair after it."""
    neighbours = pixels[max(0, i - 1) : i] + pixels[i + 1 : i + 2]
    return i + 1 < len(pixels) and pixels[i] < STALL * min(neighbours)
