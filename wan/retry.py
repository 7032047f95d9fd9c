"""Denoisers around the denoiser: a step that fails is done again in another way.

No state of a run is lost by that: a step changes nothing but the residuals of TeaCache, which it makes anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .attention import Attention
from .memory import MemoryPlan
from .option import Call, Denoiser
from .out_of_memory import OutOfMemoryError, OutOfMemoryOn
from .refusal import Refusal

MEMORY_TRIES = 8  # of one step: the plans, then weights taken off the device bit by bit
Say = Callable[[str], None]


class NotFinite(Refusal):
    """A step's velocity holds NaN or infinite numbers."""


class WithinMemory:
    """Makes room and goes on with the next memory plan when memory runs out.

    Args:
        inner: the denoiser.
        plans: to begin with the first; as from `wan.memory.plans_from`.
        make_room: lets go of what the device holds beside the step, weights in the end; False: there was
            nothing left.
        say: takes one sentence for each time a step is done again.
    """

    def __init__(self, inner: Denoiser, plans: Sequence[MemoryPlan], make_room: Callable[[], bool], say: Say):
        self.inner = inner
        self.config = inner.config
        self.embed_time = inner.embed_time
        self.plans = list(plans)
        self.make_room = make_room
        self.say = say

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        failure = where = ""
        for _ in range(MEMORY_TRIES):
            try:
                return self.inner.predict(x, timestep, replace(call, plan=self.plans[0]))
            except OutOfMemoryError as error:
                failure = str(error)  # the error itself would hold the tensors of the step
                where = f" on {error.device}" if isinstance(error, OutOfMemoryOn) else ""
            room = self.make_room()
            if len(self.plans) > 1:
                del self.plans[0]
            elif not room:
                break
            self.say(
                f"out of memory{where} in step {call.step + 1}, which was done again; from there on: "
                f"{self.plans[0]}"
            )
        raise OutOfMemoryError(
            f"{failure} This was with the plan of least memory ({self.plans[0]}). Set fewer frames or a "
            "smaller size, or load fp8 or GGUF weights"
        )


class FiniteOrExact:
    """Does a step that gave NaN again with an exact attention, and the rest of the run.

    A quantised backend may overflow. Where the attention is exact the model is the cause, and doing the step
    again would take as long and give the same.

    Args:
        inner: the denoiser.
        exact: the attention for that; None where the one in use is exact.
        say: takes one sentence when it has mended a step.
    """

    def __init__(self, inner: Denoiser, exact: Attention | None, say: Say):
        self.inner = inner
        self.config = inner.config
        self.embed_time = inner.embed_time
        self.exact = exact
        self.say = say
        self.fell_back = False

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        """As of a `Denoiser`.

        Raises:
            NotFinite: with the exact attention.
        """
        chosen = call.attention
        if self.exact is not None and self.fell_back:
            call = replace(call, attention=self.exact)
        v = self.inner.predict(x, timestep, call)
        if self.exact is not None and not self.fell_back and not _is_finite(v):
            self.fell_back = True
            v = self.inner.predict(x, timestep, replace(call, attention=self.exact))
            if _is_finite(v):
                name = "of the host's choice" if chosen is None else chosen.name
                self.say(
                    f"attention {name} gave NaN in step {call.step + 1}; it was done again, and the rest, "
                    f"with {self.exact.name}"
                )
        if not _is_finite(v):
            raise NotFinite(
                f"step {call.step + 1} of {call.steps} gave NaN or infinite numbers",
                "The usual cause is fp16 overflow: compute in bf16",
            )
        return v


def _is_finite(velocities: dict[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(v).all()) for v in velocities.values())
