"""The one place where the options meet: schedule, passes, guidance and solver make a video latent."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .attention import SDPA, Attention
from .conditioning import pixel_frames
from .config import WanConfig
from .dit import BlockRunner
from .guidance import cfg, cfg_zero_star
from .memory import JOINT, MemoryPlan, plans_from
from .rope import axis_frequencies, riflex, riflex_least_frames
from .sigmas import partial_sigmas, timesteps
from .skip_layer import is_skipped_at, skip_layers
from .solvers import SOLVERS
from .teacache import Plan, Profile, TeaCache, plan_steps

MEMORY_TRIES = 8  # of one step: the plans, then weights taken off the device bit by bit
RIFLEX = ("auto", "on", "off")
RIFLEX_AUTO_FRAMES = 97  # Wan2GP's choice: one second past the trained length


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
        teacache_multiplier: steps over computed steps; 0 or 1 computes all.
        teacache_start_percent: share of the steps that is computed in any case, whole percent.
        teacache_profile: its coefficients; needed when the multiplier is above 1.
        cfg_star: CFG-Zero* in place of plain guidance, from `cfg_star_start_step` on.
        zero_init_steps: first steps in which the velocity is zero.
        riflex: auto, on or off.
        joint_pass: walk all passes through each block before the next block; else one after the other.
        attention: backend, or None for the model's own.
        plans: memory plans, the first to begin with and a next one each time memory runs out; empty for
            those from `joint_pass` on.
        skip_layers: blocks that the unconditional pass leaves out in the steps from
            `skip_layer_start_percent` to `skip_layer_end_percent`, whole percents.
    """

    steps: int = 30
    guidance_scale: float = 5.0
    flow_shift: float = 5.0
    solver: str = "unipc"
    denoise: float = 1.0
    teacache_multiplier: float = 0.0
    teacache_start_percent: int = 0
    teacache_profile: Profile | None = None
    cfg_star: bool = False
    cfg_star_start_step: int = 0
    zero_init_steps: int = 0
    riflex: str = "off"
    joint_pass: bool = True
    attention: Attention | None = None
    plans: tuple[MemoryPlan, ...] = ()
    skip_layers: tuple[int, ...] = ()
    skip_layer_start_percent: int = 10
    skip_layer_end_percent: int = 90

    @property
    def pass_names(self):
        return ("cond",) if self.guidance_scale == 1 else ("cond", "uncond")

    def skips_at(self, i):
        """Whether the unconditional pass leaves out blocks in step `i`."""
        percents = self.skip_layer_start_percent, self.skip_layer_end_percent
        return bool(self.skip_layers) and is_skipped_at(i, self.steps, *percents)

    @property
    def sigmas(self):
        """Noise levels from the first step's to 0: `steps + 1` numbers."""
        return partial_sigmas(self.steps, self.flow_shift, self.solver, self.denoise)


@dataclass
class SampleRecord:
    """What was done, for the report.

    Attributes:
        passes: names of the passes of each step; none where the velocity was zero.
        seconds: of each step.
        plan: TeaCache's, over the steps after the zero-init ones, or None.
        riflex: whether it lowered a frequency.
        notes: sentences on what was adjusted or had no effect.
    """

    sigmas: list[float]
    timesteps: list[float]
    passes: list[tuple[str, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    plan: Plan | None = None
    riflex: bool = False
    notes: list[str] = field(default_factory=list)


Around = Callable[[BlockRunner], BlockRunner]


@dataclass(frozen=True)
class Call:
    """How one step calls the model.

    Attributes:
        pass_names: the passes to run.
        around: runners around the model's block runner, innermost first.
        frequencies: of RoPE, or None for the model's own.
        attention: backend, or None for the model's own.
        plan: how the passes walk the blocks.
        step: its number, from 0.
    """

    pass_names: tuple[str, ...]
    around: tuple[Around, ...] = ()
    frequencies: tuple[Tensor, ...] | None = None
    attention: Attention | None = None
    plan: MemoryPlan = JOINT
    step: int = 0


class NotFinite(ArithmeticError):
    """A step's velocity holds NaN or infinite numbers."""


class Denoiser(Protocol):
    """A loaded model with its prompts, as the sampling loop sees it."""

    config: WanConfig

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        """Velocity of each pass at x [B, 16, T, h, w], float32.

        Raises:
            torch.OutOfMemoryError: the device has too little; the same call may be made again.
        """

    def make_room(self) -> bool:
        """Let go of what the device holds beside this call, weights in the end. False: there was nothing."""

    def embed_time(self, timesteps: list[float]) -> Tensor:
        """Time embeddings [len(timesteps), D]."""


def sample(job: SampleJob, model: Denoiser, noise, latent, on_step=None):
    """Run one job.

    Args:
        noise: standard normal [B, 16, T, h, w], float32.
        latent: normalised latent of the same shape to start from; read only when `job.denoise` < 1,
            since the release starts a full run from noise alone.
        on_step: `on_step(i, x0)` after each step, with the current estimate of the clean latent.

    Returns:
        (clean normalised latent, SampleRecord)
    """
    sigmas = job.sigmas
    record = SampleRecord(sigmas, timesteps(sigmas, job.solver))
    velocity = _Velocity(job, model, record, noise.shape[2])
    clock = time.perf_counter()

    def after_step(i, x0, x):
        nonlocal clock
        record.seconds.append(time.perf_counter() - clock)
        clock = time.perf_counter()
        if on_step is not None:
            on_step(i, x0)

    x = noise if job.denoise > 0.9999 else sigmas[0] * noise + (1 - sigmas[0]) * latent
    return SOLVERS[job.solver](velocity, x, sigmas, after_step), record


class _Velocity:
    """The velocity of every step of one run. All state of the options lives here and goes with the run."""

    def __init__(self, job, model, record, latent_frames):
        self.job = job
        self.model = model
        self.record = record
        self.step_at = {sigma: i for i, sigma in enumerate(record.sigmas)}
        self.attention = job.attention
        self.plans = list(job.plans or plans_from(job.joint_pass, len(job.pass_names)))
        self.may_fall_back = job.attention is None or job.attention.quantised
        self.frequencies = _frequencies(job.riflex, model.config, latent_frames, record)
        self.cache = None
        if job.teacache_multiplier > 1:
            told = record.timesteps[job.zero_init_steps :]
            record.plan = plan_steps(
                model.embed_time(told),
                job.teacache_profile,
                job.teacache_multiplier,
                job.teacache_start_percent,
            )
            self.cache = TeaCache(record.plan)
        _note_idle_guidance(job, record)

    def __call__(self, x, sigma):
        i = self.step_at[sigma]
        if i < self.job.zero_init_steps:
            self.record.passes.append(())
            return torch.zeros_like(x)
        v = self.predict(x, i)
        self.record.passes.append(self.job.pass_names)
        if "uncond" not in v:
            return v["cond"]
        starred = self.job.cfg_star and i >= self.job.cfg_star_start_step
        return (cfg_zero_star if starred else cfg)(v["cond"], v["uncond"], self.job.guidance_scale)

    def predict(self, x, i):
        v = self.predict_in_memory(x, i)
        if not _is_finite(v) and self.may_fall_back:
            name = "of the host's choice" if self.attention is None else self.attention.name
            self.attention, self.may_fall_back = SDPA, False
            v = self.predict_in_memory(x, i)
            if _is_finite(v):
                self.record.notes.append(
                    f"attention {name} gave NaN in step {i + 1}; it was done again, and the rest, with sdpa"
                )
        if not _is_finite(v):
            raise NotFinite(f"step {i + 1} of {self.job.steps} gave NaN or infinite numbers")
        return v

    def predict_in_memory(self, x, i):
        """The velocities of a step, which is done again with less when memory runs out.

        No state is lost: a step changes nothing but TeaCache's residuals, which it makes anew.
        """
        for _ in range(MEMORY_TRIES):
            try:
                return self.model.predict(x, self.record.timesteps[i], self.call(i))
            except torch.OutOfMemoryError as error:
                failure = str(error)  # the error itself would hold the tensors of the step
            room = self.model.make_room()
            if len(self.plans) > 1:
                del self.plans[0]
            elif not room:
                break
            self.record.notes.append(
                f"out of memory in step {i + 1}, which was done again; from there on: {self.plans[0]}"
            )
        raise torch.OutOfMemoryError(
            f"{failure} This was with the plan of least memory ({self.plans[0]}). Set fewer frames or a "
            "smaller size, or load fp8 or GGUF weights"
        )

    def call(self, i):
        """What step `i` asks of the model. TeaCache goes around the others: it stores what they made."""
        job, around = self.job, ()
        if job.skips_at(i):
            around += (skip_layers(job.skip_layers),)
        if self.cache is not None:
            around += (self.cache.around(i - job.zero_init_steps),)
        return Call(job.pass_names, around, self.frequencies, self.attention, self.plans[0], i)


def _is_finite(velocities):
    return all(torch.isfinite(v).all() for v in velocities.values())


def _frequencies(mode, config, latent_frames, record):
    """RoPE frequencies under RIFLEx, or None for the model's own."""
    frames = pixel_frames(latent_frames)
    if mode == "off" or (mode == "auto" and frames < RIFLEX_AUTO_FRAMES):
        return None
    plain = axis_frequencies(config.head_dim)
    least = riflex_least_frames(plain)
    if latent_frames < least:
        record.notes.append(
            f"riflex has no effect on {latent_frames} latent frames: it lowers a frequency from {least} on "
            f"({pixel_frames(least)} frames), and never raises one"
        )
        return None
    record.riflex = True
    return riflex(plain, latent_frames)


def _note_idle_guidance(job, record):
    alone = "uncond" not in job.pass_names
    for name, used in (("cfg_star", job.cfg_star), ("skip_layers", job.skip_layers)):
        if used and alone:
            record.notes.append(f"{name} has no effect at guidance_scale 1, which runs no unconditional pass")
    if job.cfg_star and not alone and job.cfg_star_start_step >= job.steps:
        record.notes.append(
            f"cfg_star has no effect: it starts at step {job.cfg_star_start_step} of {job.steps}, from 0"
        )
    if job.skip_layers and not alone and not any(job.skips_at(i) for i in range(job.steps)):
        start, end = job.skip_layer_start_percent, job.skip_layer_end_percent
        record.notes.append(
            f"skip_layers has no effect: no step of {job.steps} lies between {start} % and {end} %"
        )
