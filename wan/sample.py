"""The one place where the options meet: schedule, passes, guidance and solver make a video latent."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from .guidance import cfg
from .sigmas import partial_sigmas, timesteps
from .solvers import SOLVERS


@dataclass(frozen=True)
class SampleJob:
    """What to sample, in the field's units.

    Attributes:
        steps: model evaluations per pass.
        guidance_scale: classifier-free guidance weight; 1 runs no unconditional pass.
        flow_shift: shift of the flow schedule (the release: 3 for image-to-video at 480p, else 5;
            16 for first-last-frame).
        solver: unipc, dpm++ or euler.
        denoise: part of the schedule to run, in (0, 1]; below 1 the given latent is the start.
    """

    steps: int = 30
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    solver: str = "unipc"
    denoise: float = 1.0

    @property
    def pass_names(self):
        return ("cond",) if self.guidance_scale == 1 else ("cond", "uncond")

    @property
    def sigmas(self):
        """Noise levels from the first step's to 0: `steps + 1` numbers."""
        return partial_sigmas(self.steps, self.flow_shift, self.solver, self.denoise)


@dataclass
class SampleRecord:
    """What was done, for the report."""

    sigmas: list[float]
    timesteps: list[float]
    passes: list[tuple[str, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


Predict = Callable[[Tensor, float, tuple[str, ...]], dict[str, Tensor]]


def sample(job: SampleJob, predict: Predict, noise, latent, on_step=None):
    """Run one job.

    Args:
        predict: `predict(x, timestep, pass_names)` -> velocity of each pass, float32.
        noise: standard normal [B, 16, T, h, w], float32.
        latent: normalised latent of the same shape to start from; read only when `job.denoise` < 1,
            since the release starts a full run from noise alone.
        on_step: `on_step(i, x0)` after each step, with the current estimate of the clean latent.

    Returns:
        (clean normalised latent, SampleRecord)
    """
    sigmas = job.sigmas
    record = SampleRecord(sigmas, timesteps(sigmas, job.solver))
    timestep_at = dict(zip(sigmas, record.timesteps))

    def velocity(x, sigma):
        names = job.pass_names
        v = predict(x, timestep_at[sigma], names)
        record.passes.append(names)
        return cfg(v["cond"], v["uncond"], job.guidance_scale) if "uncond" in v else v["cond"]

    clock = time.perf_counter()

    def after_step(i, x0, x):
        nonlocal clock
        record.seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        if on_step is not None:
            on_step(i, x0)

    x = noise if job.denoise > 0.9999 else sigmas[0] * noise + (1 - sigmas[0]) * latent
    return SOLVERS[job.solver](velocity, x, sigmas, after_step), record
