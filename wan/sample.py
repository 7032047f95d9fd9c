"""The sampling loop: schedule, passes, guidance and solver make a video latent."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import WanConfig
from .guidance import cfg
from .inpaint import Kept
from .option import Call, Denoiser, GuidanceRule, Option, Run, SampleRecord
from .sigmas import BELOW_ONE, StepRange, is_full_run, partial_sigmas, timestep, timesteps
from .solvers import SOLVERS, NoiseSampler

OnStep = Callable[[int, Tensor], None]
WHOLE = StepRange()
ROUNDING = 1e-3  # of a timestep: 0.9 in float32, as a SIGMAS holds it, is 899.99998


@dataclass(frozen=True)
class Leg:
    """The steps of a run that one model takes.

    Attributes:
        steps: from 0.
        guidance_scale: 1 runs no unconditional pass.
    """

    steps: range
    guidance_scale: float

    @property
    def pass_names(self) -> tuple[str, ...]:
        return ("cond",) if self.guidance_scale == 1 else ("cond", "uncond")


@dataclass(frozen=True)
class SampleJob:
    """What to sample, in the field's units.

    Attributes:
        steps: intervals of the schedule.
        guidance_scale: classifier-free guidance weight; 1 runs no unconditional pass.
        flow_shift: shift of the flow schedule (the release: 3 for image-to-video at 480p, else 5;
            16 for first-last-frame).
        solver: a key of `wan.solvers.SOLVERS`.
        denoise: part of the schedule to run, in (0, 1]; the given latent is the start of all but a full run.
        options: those that take part, in the order in which they act.
        given_sigmas: a schedule in place of the one that steps, flow_shift and denoise make.
        below_one: in place of a first given sigma of 1, for a solver that takes none.
        part: of the schedule.
        boundary: where a second model takes over, in [0, 1]: it has the steps whose timestep is below
            1000 * boundary, rounding apart. 0 is one model.
        low_noise_guidance_scale: the second model's; None is `guidance_scale`.
    """

    steps: int = 30
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    solver: str = "unipc"
    denoise: float = 1.0
    options: tuple[Option, ...] = ()
    given_sigmas: tuple[float, ...] | None = None
    below_one: float = 1.0
    part: StepRange = WHOLE
    boundary: float = 0.0
    low_noise_guidance_scale: float | None = None

    @property
    def sigmas(self) -> list[float]:
        """Noise levels from the first step's on, one more than steps; the last is 0 in all but some parts."""
        first, *rest = self._asked_for
        return [self.below_one if first >= 1 else first, *rest]

    @property
    def first_sigma(self) -> float:
        """The noise level of the start; above `sigmas[0]` where a solver takes no 1."""
        return self._asked_for[0]

    @property
    def _asked_for(self) -> list[float]:
        whole = self.given_sigmas
        if whole is None:
            whole = partial_sigmas(self.steps, self.flow_shift, self.solver, self.denoise)
        return self.part.of(whole)

    @property
    def told(self) -> list[float]:
        """The timestep of each step, as a model is told it."""
        return timesteps(self.sigmas, self.solver)

    @property
    def starts_from_noise(self) -> bool:
        """Whether the start is noise alone, as in the release; else it is a latent with noise added."""
        begins = self.part.start_at_step == 0 and self.part.add_noise
        return begins and self.given_sigmas is None and is_full_run(self.denoise)

    @property
    def legs(self) -> tuple[Leg, Leg]:
        """What the first and the second model take; one of them may have no steps."""
        told = self.told
        change = sum(t >= 1000 * self.boundary - ROUNDING for t in told)
        second = self.low_noise_guidance_scale
        return (
            Leg(range(change), self.guidance_scale),
            Leg(range(change, len(told)), self.guidance_scale if second is None else second),
        )

    @property
    def reads_negative(self) -> bool:
        """Whether an option reads the negative text though no unconditional pass may run."""
        return any(option.needs_negative for option in self.options)

    def run_on(self, config: WanConfig, shape: tuple[int, ...], leg: Leg | None = None) -> Run:
        """The run of this job on a model of these sizes and a latent of this shape, [B, 16, T, h, w].

        Args:
            leg: of the model; the first is the whole run where one model has all.
        """
        leg = leg or self.legs[0]
        zero_steps = max((option.zero_steps for option in self.options), default=0)
        return Run(config, tuple(shape), self.told, leg.pass_names, zero_steps, leg.steps)

    def idle_options(self, run: Run) -> list[str]:
        """Why options have no effect on this run, one sentence each."""
        return [why for option in self.options if (why := option.idle(run)) is not None]

    def active(self, run: Run) -> list[Option]:
        """The options that have an effect on this run."""
        return [option for option in self.options if option.idle(run) is None]


class Sampling:
    """One run of a solver, which models carry on one after the other.

    Args:
        job: what to sample.
        noise: standard normal [B, 16, T, h, w], float32; zeros where the latent has its noise already.
        latent: normalised latent of the same shape to start from; not read where the job starts from noise.
        on_step: `on_step(i, x0)` after each step, with the current estimate of the clean latent.
        fresh: noise for solvers that add some on the way.
    """

    def __init__(
        self,
        job: SampleJob,
        noise: Tensor,
        latent: Tensor | None,
        on_step: OnStep | None = None,
        fresh: NoiseSampler | None = None,
    ):
        self.job = job
        self.sigmas = job.sigmas
        self.shape = tuple(noise.shape)
        self.on_step = on_step
        x = noise * job.first_sigma if job.solver in BELOW_ONE else noise
        if not job.starts_from_noise:
            assert latent is not None
            x = job.first_sigma * noise + (1 - job.first_sigma) * latent
        self._solver = SOLVERS[job.solver](x, self.sigmas, self._after_step, fresh)
        self._asked: tuple[Tensor, float] | None = next(self._solver)
        self.latent = x  # at the last sigma, once all legs are done

    def advance(
        self,
        denoiser: Denoiser,
        leg: Leg,
        kept: Kept | None = None,
        options: tuple[Option, ...] | None = None,
    ) -> SampleRecord:
        """Takes the steps of a leg with its model.

        Args:
            denoiser: the model with its prompts.
            kept: the part of the latent that is not sampled, if any.
            options: of this model; None is those of the job.
        """
        job = self.job if options is None else replace(self.job, options=options)
        run = job.run_on(denoiser.config, self.shape, leg)
        self._record = SampleRecord(self.sigmas, run.timesteps)
        velocity = _Velocity(job, leg, run, denoiser, self._record)
        ask = velocity if kept is None else kept.around(velocity)
        self._clock = time.perf_counter()
        while self._asked is not None and velocity.step_at(self._asked[1]) < leg.steps.stop:
            self._asked, asked = None, self._asked
            self._send(ask(*asked))
        return self._record

    def _send(self, v: Tensor) -> None:
        try:
            self._asked = self._solver.send(v)
        except StopIteration as done:
            self.latent = done.value

    def _after_step(self, i: int, x0: Tensor, x: Tensor) -> None:
        now = time.perf_counter()
        self._record.seconds.append(now - self._clock)
        self._clock = now
        if self.on_step is not None:
            self.on_step(i, x0)


def sample(
    job: SampleJob,
    denoiser: Denoiser,
    noise: Tensor,
    latent: Tensor | None,
    on_step: OnStep | None = None,
    kept: Kept | None = None,
    fresh: NoiseSampler | None = None,
) -> tuple[Tensor, SampleRecord]:
    """Runs one job on one model. Arguments as of `Sampling`.

    Returns:
        The normalised latent at the last sigma, and what was done.
    """
    sampling = Sampling(job, noise, latent, on_step, fresh)
    record = sampling.advance(denoiser, job.legs[0], kept)
    return sampling.latent, record


class _Velocity:
    """The velocity at any noise level of a leg. What options remember lives here and goes with it."""

    def __init__(self, job: SampleJob, leg: Leg, run: Run, denoiser: Denoiser, record: SampleRecord):
        self.job = job
        self.leg = leg
        self.run = run
        self.denoiser = denoiser
        self.record = record
        self.options = job.active(run)
        record.notes += job.idle_options(run)
        begun = [option.begin(run, denoiser.embed_time, record) for option in self.options]
        self.edits = [edit for edit in begun if edit is not None]

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        step = self.step_at(sigma)
        if step < self.run.asked.start:
            self.record.passes.append(())
            return torch.zeros_like(x)
        contexts = ("uncond",) if self.job.reads_negative else ()
        call = Call(self.run.pass_names, step, self.run.steps, contexts=contexts)
        for edit in self.edits:
            call = edit(call)
        v = self.denoiser.predict(x, timestep(sigma, self.job.solver), call)
        self.record.passes.append(call.pass_names)
        if "uncond" not in v:
            return v["cond"]
        return self.rule_at(step)(v["cond"], v["uncond"], self.leg.guidance_scale)

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
