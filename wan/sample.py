"""The sampling loop: schedule, passes, guidance and solver make a video latent."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import WanConfig
from .guidance import cfg
from .inpaint import Kept
from .option import Call, Denoiser, GuidanceRule, Option, Run, SampleRecord
from .sigmas import is_full_run, partial_sigmas, timestep, timesteps
from .solvers import SOLVERS

OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class SampleJob:
    """What to sample, in the field's units.

    Attributes:
        steps: intervals of the schedule.
        guidance_scale: classifier-free guidance weight; 1 runs no unconditional pass.
        flow_shift: shift of the flow schedule (the release: 3 for image-to-video at 480p, else 5;
            16 for first-last-frame).
        solver: unipc, dpm++ or euler.
        denoise: part of the schedule to run, in (0, 1]; the given latent is the start of all but a full run.
        options: those that take part, in the order in which they act.
    """

    steps: int = 30
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    solver: str = "unipc"
    denoise: float = 1.0
    options: tuple[Option, ...] = ()

    @property
    def pass_names(self) -> tuple[str, ...]:
        return ("cond",) if self.guidance_scale == 1 else ("cond", "uncond")

    @property
    def contexts(self) -> tuple[str, ...]:
        """Names of passes whose text is read by an option, though they may not run."""
        return ("uncond",) if any(option.needs_negative for option in self.options) else ()

    @property
    def sigmas(self) -> list[float]:
        """Noise levels from the first step's to 0: `steps + 1` numbers."""
        return partial_sigmas(self.steps, self.flow_shift, self.solver, self.denoise)

    def run_on(self, config: WanConfig, shape: tuple[int, ...]) -> Run:
        """The run of this job on a model of these sizes and a latent of this shape, [B, 16, T, h, w]."""
        told = timesteps(self.sigmas, self.solver)
        zero_steps = max((option.zero_steps for option in self.options), default=0)
        return Run(config, tuple(shape), told, self.pass_names, zero_steps)

    def idle_options(self, run: Run) -> list[str]:
        """Why the others have none, one sentence each."""
        return [why for option in self.options if (why := option.idle(run)) is not None]

    def active(self, run: Run) -> list[Option]:
        """The options that have an effect on this run."""
        return [option for option in self.options if option.idle(run) is None]


def sample(
    job: SampleJob,
    denoiser: Denoiser,
    noise: Tensor,
    latent: Tensor | None,
    on_step: OnStep | None = None,
    kept: Kept | None = None,
) -> tuple[Tensor, SampleRecord]:
    """Runs one job.

    Args:
        job: what to sample.
        denoiser: the model with its prompts.
        noise: standard normal [B, 16, T, h, w], float32.
        latent: normalised latent of the same shape to start from; not read in a full run, which the release
            starts from noise alone.
        on_step: `on_step(i, x0)` after each step, with the current estimate of the clean latent.
        kept: the part that is not sampled, if any.

    Returns:
        The clean normalised latent, and what was done.
    """
    sigmas = job.sigmas
    run = job.run_on(denoiser.config, tuple(noise.shape))
    record = SampleRecord(sigmas, run.timesteps)
    velocity = _Velocity(job, run, denoiser, record)
    clock = time.perf_counter()

    def after_step(i: int, x0: Tensor, x: Tensor) -> None:
        nonlocal clock
        record.seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        if on_step is not None:
            on_step(i, x0)

    x = noise
    if not is_full_run(job.denoise):
        assert latent is not None
        x = sigmas[0] * noise + (1 - sigmas[0]) * latent
    ask = velocity if kept is None else kept.around(velocity)
    return SOLVERS[job.solver](ask, x, sigmas, after_step), record


class _Velocity:
    """The velocity at any noise level of one run. What options remember lives here and goes with it."""

    def __init__(self, job: SampleJob, run: Run, denoiser: Denoiser, record: SampleRecord):
        self.job = job
        self.run = run
        self.denoiser = denoiser
        self.record = record
        self.options = job.active(run)
        record.notes += job.idle_options(run)
        begun = [option.begin(run, denoiser.embed_time, record) for option in self.options]
        self.edits = [edit for edit in begun if edit is not None]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        step = self.step_at(sigma)
        if step < self.run.first_step:
            self.record.passes.append(())
            return torch.zeros_like(x)
        call = Call(self.run.pass_names, step, self.run.steps, contexts=self.job.contexts)
        for edit in self.edits:
            call = edit(call)
        v = self.denoiser.predict(x, timestep(sigma, self.job.solver), call)
        self.record.passes.append(call.pass_names)
        if "uncond" not in v:
            return v["cond"]
        return self.rule_at(step)(v["cond"], v["uncond"], self.job.guidance_scale)

    def step_at(self, sigma: float) -> int:
        """The step under way: the last that begins at this noise level or above it.

        A solver may ask between two noise levels of the schedule, and at the end of a step.
        """
        begun = sum(scheduled >= sigma for scheduled in self.record.sigmas[:-1])
        return max(0, begun - 1)

    def rule_at(self, step: int) -> GuidanceRule:
        """The guidance rule of the last option that has one in this step, or plain `cfg`."""
        rules = [rule for option in self.options if (rule := option.guidance(step)) is not None]
        return rules[-1] if rules else cfg
