"""TeaCache: steps that would change little reuse what the blocks added in an earlier one.

Liu et al., arXiv 2411.19108. How much a step changes is told from the time embedding alone, so which steps
are computed is known before the first one. Here one rule is kept of the published variants: distances of the
time embedding (not of its projection), polynomial in absolute value, first and last step computed, and one
plan for all passes, as Wan2GP does it since May 2025.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import torch
from torch import Tensor

from .config import WanConfig
from .dit import BlockRunner
from .memory import StepSize
from .option import Around, Call, EditCall, EmbedTime, Option, Run, SampleRecord
from .refusal import Refusal
from .run_state import state_of

PROFILES = ("auto", "i2v_480p", "i2v_720p", "t2v_14b", "t2v_1.3b", "measured")

# Relative change of the time embedding -> of the blocks' residual; highest power first.
# ali-vilab/TeaCache `TeaCache4Wan2.1/teacache_generate.py`, the sets for use without ret_steps.
COEFFICIENTS = {
    "i2v_480p": (-302.331670, 223.948934, -52.5463970, 5.87348440, -0.201973289),
    "i2v_720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
    "t2v_14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "t2v_1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
}
WIDTH_SMALL, WIDTH_LARGE = 1536, 5120  # of the 1.3B and the 14B models
AREA_480P = 848 * 480  # pixels; the largest that Wan2GP runs with the 480p model

DEGREE = 4
NO_PROFILE = (
    "Run scripts/calibrate_teacache.py on the checkpoint, choose a cache.profile, or set cache to off"
)


@dataclass(frozen=True)
class Profile:
    """Coefficients of one polynomial, highest power first, and the name they go by."""

    name: str
    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """Which steps run the blocks.

    Attributes:
        compute: one a step; False reuses the residual of the last computed step.
        threshold: of the accumulated change, from which a step is computed.
        wanted: number of computed steps that was asked for.
    """

    compute: tuple[bool, ...]
    threshold: float
    wanted: int

    @property
    def computed(self) -> int:
        return sum(self.compute)


def choose_profile(
    name: str, config: WanConfig, file_name: str, pixels: int, measured: Sequence[float] | None = None
) -> Profile:
    """The coefficients for a model.

    Args:
        name: one of `PROFILES`.
        config: of the model.
        file_name: of the checkpoint; says 480p or 720p where it was published.
        pixels: width*height of the video; decides where the name does not.
        measured: coefficients that belong to this very checkpoint, or None.

    Raises:
        Refusal: there are none for it.
    """
    if name == "measured" or (name == "auto" and measured is not None):
        if measured is None:
            raise Refusal(
                f"cache.profile is measured and {file_name} has no coefficients of its own", NO_PROFILE
            )
        return Profile("measured", tuple(measured))
    if name == "auto":
        name = _published_profile(config, file_name.lower(), pixels)
    return Profile(name, COEFFICIENTS[name])


def _published_profile(config: WanConfig, file_name: str, pixels: int) -> str:
    if config.dim == WIDTH_SMALL:
        return "t2v_1.3b"
    if config.dim != WIDTH_LARGE:
        raise Refusal(
            f"there are no TeaCache coefficients for a model of width {config.dim} "
            f"(published: {WIDTH_SMALL} and {WIDTH_LARGE})",
            NO_PROFILE,
        )
    if not config.takes_image:
        return "t2v_14b"
    if "720p" in file_name or "480p" in file_name:
        return "i2v_720p" if "720p" in file_name else "i2v_480p"
    return "i2v_720p" if pixels > AREA_480P else "i2v_480p"


def check_coefficients(values: object) -> tuple[float, ...]:
    """Coefficients as read from a file -> tuple of floats.

    Raises:
        Refusal: they are not a list of finite numbers.
    """
    items = values if isinstance(values, list) else []
    if not items or not all(type(v) in (int, float) and math.isfinite(v) for v in items):
        raise Refusal(f"TeaCache coefficients are {values!r}; they must be a list of numbers", NO_PROFILE)
    return tuple(float(v) for v in items)


def relative_changes(x: Tensor) -> list[float]:
    """Mean absolute change from each row to the next over the mean of the earlier: [N, ...] -> N-1 floats."""
    x = x.cpu().double().flatten(1)
    return ((x[1:] - x[:-1]).abs().mean(dim=1) / x[:-1].abs().mean(dim=1)).tolist()


def plan_steps(embeddings: Tensor, profile: Profile, multiplier: float, start_percent: int = 0) -> Plan:
    """The plan that comes nearest to a speed-up.

    Args:
        embeddings: time embedding of every step that runs the model [N, D].
        profile: of the model.
        multiplier: steps over computed steps, at least 1.
        start_percent: share of the steps that is computed in any case, in whole percent; the first and
            the last step always are.

    Returns:
        A plan with int(N / multiplier) computed steps, or the nearest number that any threshold gives.
    """
    steps = len(embeddings)
    distances = relative_changes(embeddings)
    changes = [0.0] + [abs(_polynomial(profile.coefficients, d)) for d in distances]
    start_step = start_percent * steps // 100
    wanted = max(1, int(steps / multiplier))

    def plan(threshold: float) -> Plan:
        return Plan(tuple(_walk(changes, threshold, start_step)), threshold, wanted)

    def edge(count: int) -> tuple[Plan, Plan]:
        """(a plan of more than `count` computed steps, the one of no more whose threshold is least)."""
        low, high = plan(0.0), plan(sum(changes) + 1)
        while low.threshold < (middle := (low.threshold + high.threshold) / 2) < high.threshold:
            halved = plan(middle)
            low, high = (halved, high) if halved.computed > count else (low, halved)
        return low, high

    # The count only falls as the threshold grows, so halving finds where it passes the wanted one. Of all
    # thresholds of one count the least is best: every reused step is then nearest to what it reuses.
    more, fewer = edge(wanted)
    if more.computed > wanted and more.computed - wanted <= wanted - fewer.computed:
        return edge(more.computed)[1]
    return fewer if more.computed > wanted else more


def _polynomial(coefficients: Sequence[float], x: float) -> float:
    value = 0.0
    for c in coefficients:
        value = value * x + c
    return value


def _walk(changes: list[float], threshold: float, start_step: int) -> Iterator[bool]:
    """Whether each step is computed."""
    accumulated = 0.0
    for i, change in enumerate(changes):
        accumulated += change
        compute = i <= start_step or i == len(changes) - 1 or accumulated >= threshold
        if compute:
            accumulated = 0.0
        yield compute


class Residuals:
    """What the blocks added in the last computed step of a run, by pass name; dropped with the run.

    Args:
        key: of this run's in all processes that make its calls, each with residuals of its own tokens.
    """

    def __init__(self, plan: Plan, key: str | None = None):
        self.plan = plan
        self.key = uuid4().hex if key is None else key
        self.residuals: dict[str, Tensor | None] = {}

    def __reduce__(self):
        return state_of, (self.key, Residuals, self.plan, self.key)

    def around(self, step: int) -> Around:
        """A runner around the runner for this step: computes and remembers, or reuses."""
        return partial(_cached, self, step)

    def of_step(self, step: int, runner: BlockRunner) -> BlockRunner:
        """That runner around `runner`."""
        reused_next = step + 1 < len(self.plan.compute) and not self.plan.compute[step + 1]
        computing = self._remember(runner) if reused_next else runner
        return computing if self.plan.compute[step] else self._reuse_or(computing)

    def _reuse_or(self, computing: BlockRunner) -> BlockRunner:
        def run(num_blocks, passes, apply_block):
            residuals = [self.residuals.get(p.name) for p in passes]
            if any(r is None for r in residuals):  # lost with another process, which had them
                computing(num_blocks, passes, apply_block)
                return
            for p, residual in zip(passes, residuals):
                p.x = p.x + residual  # a 16-bit residual is added in the stream's float32

        return run

    def _remember(self, runner: BlockRunner) -> BlockRunner:
        def run(num_blocks, passes, apply_block):
            self.residuals.update((p.name, None) for p in passes)  # freed before the new ones are taken
            before = {p.name: p.x.clone() for p in passes}
            runner(num_blocks, passes, apply_block)
            for p in passes:
                # In 16 bit where the model computes in 16 bit: bfloat16, because the stream outgrows float16.
                dtype = torch.float32 if p.text.dtype == torch.float32 else torch.bfloat16
                residual = torch.sub(p.x, before[p.name], out=before[p.name])
                self.residuals[p.name] = residual.to(dtype)

        return run


def reused_step(call: Call | None) -> int | None:
    """The step whose velocity TeaCache takes from residuals in a call; None where it computes."""
    for around in () if call is None else call.around:
        if isinstance(around, partial) and around.func is _cached:
            residuals, step = around.args
            return None if residuals.plan.compute[step] else step
    return None


def _cached(residuals: Residuals, step: int, runner: BlockRunner) -> BlockRunner:
    """`Residuals.of_step`; a function, because a method of what is pickled by key could not be."""
    return residuals.of_step(step, runner)


@dataclass(frozen=True)
class TeaCache(Option):
    """Steps that reuse residuals, by a plan made before the first one.

    Attributes:
        multiplier: steps over computed steps.
        start_percent: share of the steps that is computed in any case, whole percent.
        profile: coefficients of the model; needed when the multiplier is above 1.
    """

    multiplier: float
    start_percent: int = 0
    profile: Profile | None = None

    def check(self, run: Run) -> None:
        if self.multiplier < 1:
            raise Refusal(
                f"cache.multiplier is {self.multiplier:g}; a speed-up is at least 1",
                "Set 1.5 to 2.5",
            )

    def sized(self, size: StepSize) -> StepSize:
        return replace(size, teacache=True)

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        assert self.profile is not None
        told = [run.timesteps[step] for step in run.asked]
        record.plan = plan_steps(embed_time(told), self.profile, self.multiplier, self.start_percent)
        residuals = Residuals(record.plan)

        def edit(call: Call) -> Call:
            return replace(call, around=(*call.around, residuals.around(call.step - run.asked.start)))

        return edit

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        """The plan as a line of marks (# computed, . reused, 0 no velocity), what it promised and gave."""
        plan, zeros = record.plan, run.asked.start - run.own_steps.start
        assert plan is not None and self.profile is not None
        total = len(plan.compute)
        speed_up = total / plan.computed
        yield (
            f"teacache: {plan.computed} of {total} steps computed, profile {self.profile.name}, "
            f"threshold {plan.threshold:.3g}"
        )
        yield "plan: " + "0" * zeros + "".join("#" if compute else "." for compute in plan.compute)
        if plan.computed != plan.wanted:
            yield (
                f"cache.multiplier {self.multiplier:g} asks for {plan.wanted} computed steps; the "
                f"nearest that can be is {plan.computed}, {speed_up:.2f}x"
            )
        timed = list(zip(plan.compute, record.seconds[zeros:]))[1:]  # the first step also loads the model
        computed, reused = ([s for c, s in timed if c is kind] for kind in (True, False))
        if computed and reused:
            each = sum(computed) / len(computed)
            measured = total * each / (plan.computed * each + sum(reused))
            yield (
                f"speed-up: {speed_up:.2f}x expected, {measured:.2f}x measured "
                f"({each:.3g} s a computed step, {sum(reused) / len(reused):.3g} s a reused one)"
            )
