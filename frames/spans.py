"""What lies between two frames: motion, a cut, or a duplicate. The plan of what to interpolate.

Images are [F, H, W, 3] in [0, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_SIDE = 32  # pixels a frame is shrunk to before its content is compared
SCENE_CUT = 0.8  # content change, 1 - SSIM, above which two frames are a cut
STALL = 0.1  # a pair that changes less than this share of its neighbours is a duplicated frame


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

    def times(self, multiplier: int) -> list[float]:
        """The places of the new frames in (0, 1), 0 being `first` and 1 `last`."""
        count = (self.last - self.first) * multiplier
        return [k / count for k in range(1, count)]


def frame_changes(
    images: Tensor, on_frame: Callable[[int], None] = lambda i: None
) -> tuple[list[float], list[float]]:
    """How much each frame differs from the next.

    Args:
        images: [F, H, W, 3] in [0, 1].
        on_frame: called with the index of each pair before it is compared.

    Returns:
        Two lists of F - 1: the change of content, 1 - SSIM of the frames shrunk to 32x32 (in [0, 2]), and
        the mean absolute difference of their pixels.
    """
    content: list[float] = []
    pixels: list[float] = []
    last = _shrunk(images[0])
    for i in range(len(images) - 1):
        on_frame(i)
        here = _shrunk(images[i + 1])
        content.append(1 - _ssim(last, here))
        pixels.append((images[i + 1].float() - images[i].float()).abs().mean().item())
        last = here
    return content, pixels


def _shrunk(frame: Tensor) -> Tensor:
    """[H, W, 3] -> (3, 32, 32), area average."""
    return F.adaptive_avg_pool2d(frame.float().permute(2, 0, 1), SSIM_SIDE)


def _ssim(a: Tensor, b: Tensor) -> float:
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


def plan_spans(content: Sequence[float], pixels: Sequence[float], scene_cut: float = SCENE_CUT) -> list[Span]:
    """What lies between the frames: motion, a cut, or a duplicate to bridge.

    A frame that stands still amid motion (it differs from the frame before by less than a tenth of what the
    neighbouring pairs do) is a duplicate: the span leads from the frame before it to the frame after it.
    Longer holds are kept, and so is a frame before a cut or at the end.

    Args:
        content, pixels: from `frame_changes`.
        scene_cut: change of content above which two frames are a cut; 1 or more finds none.

    Returns:
        Spans from the first frame to the last.
    """
    spans: list[Span] = []
    i = 0
    while i < len(content):
        cut = _is_cut(content[i], scene_cut)
        bridged = not cut and _stalls(pixels, i) and not _is_cut(content[i + 1], scene_cut)
        spans.append(Span(i, i + 1 + bridged, cut))
        i = spans[-1].last
    return spans


def _is_cut(change: float, scene_cut: float) -> bool:
    return scene_cut < 1 and change > scene_cut


def _stalls(pixels: Sequence[float], i: int) -> bool:
    """Whether pair i stands still, its neighbours move, and there is a pair after it."""
    neighbours = [*pixels[max(0, i - 1) : i], *pixels[i + 1 : i + 2]]
    return i + 1 < len(pixels) and pixels[i] < STALL * min(neighbours)
