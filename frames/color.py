"""Colours of one clip brought to those of another, where both show the same.

Images are [F, H, W, 3] in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GAIN = 1.25  # most by which contrast grows, and its inverse the most by which it falls
MAX_SHIFT = 10.0  # most by which a mean moves, in units of L*, a* or b*
FLAT = 0.5  # deviation below which a channel shows nothing: its contrast tells of no change


@dataclass(frozen=True)
class ColorMatch:
    """A change of L*a*b*, channel by channel: `(x - mean) * gain + mean + shift`.

    Attributes:
        mean, gain, shift: (3, 1, 1) float32 each.
        limited: whether a gain or a shift was larger than what is allowed.
    """

    mean: Tensor
    gain: Tensor
    shift: Tensor
    limited: bool

    def __call__(self, frame: Tensor) -> Tensor:
        """[H, W, 3] -> the same in other colours, float32 in [0, 1], on the device of the match."""
        from kornia.color import lab_to_rgb  # as in `_lab`

        lab = _lab(frame, self.mean.device)
        lab = (lab - self.mean) * self.gain + (self.mean + self.shift)
        return lab_to_rgb(lab).movedim(0, -1)


def match_colors(
    source: Tensor,
    reference: Tensor,
    device: torch.device,
    on_frame: Callable[[], None] = lambda: None,
) -> ColorMatch:
    """The change that gives frames the mean and deviation of others in L*a*b* (Reinhard et al. 2001).

    Gain and shift are bounded, so that the pixels of a clip move no further than that however many clips
    are joined: each is matched from its own frames.

    Args:
        source, reference: [F, H, W, 3] in [0, 1], of one size, which show the same.
        device: on which statistics are taken and frames are changed, one at a time.
        on_frame: called before each frame is read.
    """
    mean, deviation = _statistics(source, device, on_frame)
    wanted_mean, wanted_deviation = _statistics(reference, device, on_frame)
    gain, shift = wanted_deviation / deviation, wanted_mean - mean
    bounded_gain = gain.clamp(1 / MAX_GAIN, MAX_GAIN)
    bounded_shift = shift.clamp(-MAX_SHIFT, MAX_SHIFT)
    limited = bool((gain != bounded_gain).any() or (shift != bounded_shift).any())
    mean, gain, shift = (t.float().to(device) for t in (mean, bounded_gain, bounded_shift))
    return ColorMatch(mean, gain, shift, limited)


def _statistics(images: Tensor, device: torch.device, on_frame: Callable[[], None]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of L*a*b* over all pixels, (3, 1, 1) float64 on the CPU: not every device has it."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for frame in images:
        on_frame()
        lab = _lab(frame, device).flatten(1)
        sums += torch.stack([lab.mean(dim=1), lab.square().mean(dim=1)]).cpu().double() / len(images)
    mean, square = sums[..., None, None]
    return mean, (square - mean * mean).clamp_min(0).sqrt().clamp_min(FLAT)


def _lab(frame: Tensor, device: torch.device) -> Tensor:
    """[H, W, 3] -> (3, H, W) in L*a*b*, float32."""
    from kornia.color import rgb_to_lab  # here: to import it takes a quarter of a second

    return rgb_to_lab(frame.to(device, torch.float32).clamp(0, 1).movedim(-1, 0))
