"""Skip-layer guidance: the unconditional pass leaves blocks out, and guidance leads away from the result.

The blocks are skipped on that pass only, in the middle of the run, as Wan2GP does it; no third pass is run
(the form of Stable Diffusion 3.5, which costs half as much again).
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from functools import partial

from .dit import BlockRunner
from .option import NO_UNCONDITIONAL, Around, Call, EditCall, EmbedTime, Option, Run, SampleRecord
from .refusal import Refusal


def parse_layers(text: str) -> tuple[int, ...]:
    """ "9, 10" -> (9, 10): block numbers from 0, in order; "" -> ().

    Raises:
        Refusal: something is not a block number.
    """
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    wrong = [part for part in parts if not (part.isascii() and part.isdigit())]
    if wrong:
        raise Refusal(
            f"skip_layers.layers holds {wrong[0]!r}; it takes block numbers", "Write them like 9,10"
        )
    return tuple(sorted({int(part) for part in parts}))


def is_skipped_at(step: int, steps: int, start_percent: int, end_percent: int) -> bool:
    """Whether int(start*N) <= step < int(end*N), for a step counted from 0 of N. Whole percents."""
    return start_percent * steps // 100 <= step < end_percent * steps // 100


def skip_layers(layers: Collection[int], name: str = "uncond") -> Around:
    """A runner around the runner: the pass `name` goes past the blocks in `layers`."""
    return partial(_past, layers, name)


def _past(layers: Collection[int], name: str, runner: BlockRunner) -> BlockRunner:
    def run(num_blocks, passes, apply_block):
        def apply_or_skip(i, p):
            return p.x if p.name == name and i in layers else apply_block(i, p)

        runner(num_blocks, passes, apply_or_skip)

    return run


@dataclass(frozen=True)
class SkipLayers(Option):
    """`skip_layers` on the unconditional pass in a part of the run.

    Attributes:
        layers: numbers of the blocks, from 0.
        start_percent, end_percent: of the steps, whole percents.
    """

    layers: tuple[int, ...]
    start_percent: int = 10
    end_percent: int = 90

    def check(self, run: Run) -> None:
        count = run.config.num_layers
        unknown = ", ".join(str(layer) for layer in self.layers if layer >= count)
        if unknown:
            raise Refusal(
                f"skip_layers names block {unknown}; the model has {count}, from 0",
                f"Set numbers from 0 to {count - 1}",
            )
        if self.start_percent >= self.end_percent:
            raise Refusal(
                f"skip_layers.start_percent is {self.start_percent} and end_percent {self.end_percent}; no "
                "step lies between",
                "Set a start below the end, such as 10 and 90",
            )

    def idle(self, run: Run) -> str | None:
        if not run.is_guided:
            return f"skip_layers {NO_UNCONDITIONAL}"
        if any(self._is_on(step, run.steps) for step in run.own_steps):
            return None
        return (
            f"skip_layers has no effect: no step of {run.steps} lies between {self.start_percent} % and "
            f"{self.end_percent} %"
        )

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        def edit(call: Call) -> Call:
            if not self._is_on(call.step, call.steps):
                return call
            return replace(call, around=(*call.around, skip_layers(self.layers)))

        return edit

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        blocks = " ".join(map(str, self.layers))
        yield (
            f"skip layers: {blocks} of the unconditional pass, from {self.start_percent} % to "
            f"{self.end_percent} % of the steps"
        )

    def _is_on(self, step: int, steps: int) -> bool:
        return is_skipped_at(step, steps, self.start_percent, self.end_percent)
