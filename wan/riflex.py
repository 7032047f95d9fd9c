"""RIFLEx: a long clip stays within the period of one temporal frequency. Zhao et al., arXiv 2502.15894."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from .conditioning import pixel_frames
from .option import EditCall, EmbedTime, Option, Run, SampleRecord
from .refusal import Refusal
from .rope import axis_frequencies

K = 6  # of the time axis: the authors' answer for Wan2.1, thu-ml/DiT-Extrapolation issue 8
MODES = ("auto", "on", "off")
AUTO_FRAMES = 97  # Wan2GP's choice: one second past the trained length


def riflex(frequencies: tuple[Tensor, ...], latent_frames: int, k: int = K) -> tuple[Tensor, ...]:
    """RoPE frequencies with the k-th of the time axis lowered to 0.9*2*pi / L.

    L latent frames are then nine tenths of one turn. The frequency is never raised: below
    `riflex_least_frames` latent frames nothing changes.

    Args:
        frequencies: of the three axes, from `axis_frequencies`; not modified.
        latent_frames: L, the latent frames that are denoised.
        k: counted from 1, the frequency whose turn is the first to be seen as repetition.

    Raises:
        Refusal: the model has fewer frequencies.
    """
    time, height, width = frequencies
    if len(time) < k:
        raise Refusal(
            f"RIFLEx edits frequency {k} of the time axis, and this model has {len(time)}",
            "Set riflex to off",
        )
    time = time.clone()
    time[k - 1] = time[k - 1].clamp(max=0.9 * 2 * math.pi / latent_frames)
    return time, height, width


def riflex_least_frames(frequencies: tuple[Tensor, ...], k: int = K) -> int:
    """Latent frames from which `riflex` lowers the frequency: 46 for the released sizes."""
    return math.floor(0.9 * 2 * math.pi / frequencies[0][k - 1].item()) + 1


@dataclass(frozen=True)
class Riflex(Option):
    """`riflex` in every step.

    Attributes:
        mode: on, or auto: from `AUTO_FRAMES` pixel frames on.
    """

    mode: str = "auto"

    def check(self, run: Run) -> None:
        if self._is_wanted(run):
            riflex(axis_frequencies(run.config.head_dim), run.shape[2])

    def idle(self, run: Run) -> str | None:
        latents = run.shape[2]
        if not self._is_wanted(run):
            return f"riflex auto acts from {AUTO_FRAMES} frames on; this video has {pixel_frames(latents)}"
        least = riflex_least_frames(axis_frequencies(run.config.head_dim))
        if latents >= least:
            return None
        return (
            f"riflex has no effect on {latents} latent frames: it lowers a frequency from {least} on "
            f"({pixel_frames(least)} frames), and never raises one"
        )

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        frequencies = riflex(axis_frequencies(run.config.head_dim), run.shape[2])
        return lambda call: replace(call, frequencies=frequencies)

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        yield "riflex: one temporal frequency lowered"

    def _is_wanted(self, run: Run) -> bool:
        return self.mode == "on" or pixel_frames(run.shape[2]) >= AUTO_FRAMES
