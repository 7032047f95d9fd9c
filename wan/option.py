"""What the sampling loop, its options and a loaded model say to each other.

An option is one frozen dataclass in the file of what it does, and takes part in a job when it stands in
`SampleJob.options`. Loop, checks and report know no option by name: each asks all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from .attention import Attention
from .config import WanConfig
from .dit import BlockRunner, ContextAttention, own_text
from .memory import JOINT, MemoryPlan, StepSize

if TYPE_CHECKING:
    from .teacache import Plan


@dataclass(frozen=True)
class Run:
    """What is known of a run before its first step, for one of the models that carry it out.

    Attributes:
        config: of the model.
        shape: of the latent, [B, 16, T, h, w].
        timesteps: one a step of the whole run, in [0, 1000], as the model is told.
        pass_names: the passes of a step.
        zero_steps: so many first steps of the run have no velocity, and ask no model.
        own: the steps of this model, from 0; None is all.
    """

    config: WanConfig
    shape: tuple[int, ...]
    timesteps: list[float]
    pass_names: tuple[str, ...]
    zero_steps: int = 0
    own: range | None = None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def own_steps(self) -> range:
        return range(self.steps) if self.own is None else self.own

    @property
    def asked(self) -> range:
        """The steps that ask the model."""
        own = self.own_steps
        return range(min(max(own.start, self.zero_steps), own.stop), own.stop)

    @property
    def is_guided(self) -> bool:
        """Whether there is an unconditional pass."""
        return "uncond" in self.pass_names


@dataclass
class SampleRecord:
    """What one model did, for the report.

    Attributes:
        sigmas: the schedule of the whole run, one more than steps.
        timesteps: one a step, as the model was told.
        passes: names of the passes of each velocity; none where it was zero.
        seconds: of each of its steps.
        plan: TeaCache's, over the steps that ask the model, or None.
        notes: sentences on what had no effect.
        workers: sentences on those that computed the calls; none where they were made here.
        devices: where each pass was computed, by its name; none where all were on the model's one device.
    """

    sigmas: list[float]
    timesteps: list[float]
    passes: list[tuple[str, ...]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    plan: Plan | None = None
    notes: list[str] = field(default_factory=list)
    devices: dict[str, str] = field(default_factory=dict)
    workers: list[str] = field(default_factory=list)


Around = Callable[[BlockRunner], BlockRunner]


@dataclass(frozen=True)
class Call:
    """How one step asks the model: plain data, which another process can be sent.

    Attributes:
        pass_names: the passes to run.
        step: its number, from 0.
        steps: how many the run has.
        around: runners around the model's block runner, innermost first; each a partial of a function of
            a module. State from step to step is kept as `wan.run_state` says.
        frequencies: of RoPE, or None for the model's own.
        attention: backend, or None for the model's own.
        plan: how the passes walk the blocks.
        context_attention: how a pass attends to its text.
        contexts: names of passes whose text is handed to `context_attention` though they may not run.
    """

    pass_names: tuple[str, ...]
    step: int = 0
    steps: int = 1
    around: tuple[Around, ...] = ()
    frequencies: tuple[Tensor, ...] | None = None
    attention: Attention | None = None
    plan: MemoryPlan = JOINT
    context_attention: ContextAttention = own_text
    contexts: tuple[str, ...] = ()


class Denoiser(Protocol):
    """A loaded model with its prompts, as the sampling loop sees it. `wan.retry` has denoisers around it."""

    config: WanConfig

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        """The velocity of each pass at x [B, 16, T, h, w], float32.

        Raises:
            OutOfMemoryError: of `wan.out_of_memory`; the device has too little, and the same call may
                be made again.
        """
        ...

    def embed_time(self, timesteps: list[float]) -> Tensor:
        """Time embeddings [len(timesteps), D]."""
        ...


EmbedTime = Callable[[list[float]], Tensor]
EditCall = Callable[[Call], Call]
GuidanceRule = Callable[[Tensor, Tensor, float], Tensor]


class Option:
    """One option of the sampler; every method is the neutral one, and an option overrides what it needs.

    Options act in the order of `SampleJob.options`; runners of a later one go around those of an earlier.

    Attributes:
        zero_steps: first steps in which the velocity is zero and the model is not asked.
        needs_negative: whether it reads the negative text, which otherwise is left out where no
            unconditional pass runs. `context_attention` then finds it as `texts["uncond"]`.
    """

    zero_steps: int = 0
    needs_negative: bool = False

    def check(self, run: Run) -> None:
        """Refuses what cannot be done, before any heavy work.

        Raises:
            Refusal: a value breaks a rule, or does not fit the model or the job.
        """

    def idle(self, run: Run) -> str | None:
        """Why it has no effect on this run, as a sentence without its full stop; None when it has one.

        An idle option is left out: nothing below is asked of it.
        """
        return None

    def sized(self, size: StepSize) -> StepSize:
        """The size of a step with what the option holds on the device."""
        return size

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        """What it does to the `Call` of every step; state it keeps for this run lives in the function."""
        return None

    def guidance(self, step: int) -> GuidanceRule | None:
        """The rule that makes one velocity of two in this step: (cond, uncond, scale) -> velocity."""
        return None

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        """Lines for the report of a finished run."""
        return ()


NO_UNCONDITIONAL = "has no effect at guidance_scale 1, which runs no unconditional pass"
