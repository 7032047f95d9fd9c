"""How a step is carried out: nothing here changes what is computed, but for a backend's rounding."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .attention import Attention
from .memory import MemoryPlan, StepSize
from .option import EditCall, EmbedTime, Option, Run, SampleRecord


@dataclass(frozen=True)
class Execution(Option):
    """The walk through the blocks and the attention backend.

    Attributes:
        joint: all passes go through each block before the next block; else one after the other.
        attention: backend, or None for the model's own.
        kernels: which of `wan.kernels` are taken and why others are not, or None without a GPU.
        to_get: what an attention that is not installed would give here, where it is to be told.
    """

    joint: bool = True
    attention: Attention | None = None
    kernels: str | None = None
    to_get: str = ""

    def sized(self, size: StepSize) -> StepSize:
        return size if self.attention is None else replace(size, attention=self.attention.name)

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        return lambda call: replace(call, attention=self.attention, plan=MemoryPlan(self.joint))

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        if self.attention is None:
            yield "attention: the host's own choice"
        elif self.attention.name != "sdpa" or self.attention.kernel:
            yield f"attention: {_described(self.attention)}"
        if self.to_get:
            yield f"attention to install, by published figures: {self.to_get}"
        if self.kernels is not None:
            yield f"kernels: {self.kernels}"
        if run.is_guided and not self.joint:
            yield "joint pass: off"


def _described(attention: Attention) -> str:
    kernel = f" by {attention.kernel}" if attention.kernel else ""
    took = ", ".join(f"{name} {1000 * seconds:.3g} ms" for name, seconds in attention.seconds)
    return f"{attention.name}{kernel}" + (f"; one self-attention of this run: {took}" if took else "")
