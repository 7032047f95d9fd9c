"""Guidance rules: velocities of finished passes -> one velocity.

All act in velocity space (v = noise - clean), where the authors state them; a rule for denoised
images is another formula.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .option import NO_UNCONDITIONAL, GuidanceRule, Option, Run, SampleRecord
from .refusal import Refusal


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, v_u + w (v_c - v_u) (Ho and Salimans, arXiv 2207.12598).

    Args:
        cond, uncond: velocities of the same shape, float32.
        scale: w; 1 is the conditional velocity alone, for which `sample` skips the other pass.
    """
    return uncond + scale * (cond - uncond)


def cfg_zero_star(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """CFG-Zero*: `cfg` with the unconditional velocity scaled to fit the conditional one best.

    The scale is s* = <v_c, v_u> / (|v_u|^2 + 1e-8), one for each sample, in float32 (Fan et al., arXiv
    2503.18886; `optimized_scale` in WeichenFan/CFG-Zero-star `models/wan/wan_pipeline.py`).

    Args:
        cond, uncond: velocities [B, ...] of the same shape.
        scale: w, as in `cfg`.
    """
    cond, uncond = cond.float(), uncond.float()
    c, u = cond.flatten(1), uncond.flatten(1)
    best = (c * u).sum(dim=1) / (u.square().sum(dim=1) + 1e-8)  # (B,)
    return cfg(cond, uncond * best.view(-1, *[1] * (cond.ndim - 1)), scale)


@dataclass(frozen=True)
class CfgZeroStar(Option):
    """`cfg_zero_star` in place of `cfg`.

    Attributes:
        start_step: plain guidance before this step, counted from 0.
    """

    start_step: int = 0

    def idle(self, run: Run) -> str | None:
        if not run.is_guided:
            return f"cfg_star {NO_UNCONDITIONAL}"
        if self.start_step >= run.own_steps.stop:
            return f"cfg_star has no effect: it starts at step {self.start_step} of {run.steps}, from 0"
        return None

    def guidance(self, step: int) -> GuidanceRule | None:
        return cfg_zero_star if step >= self.start_step else None

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        yield f"guidance: CFG-Zero* from step {self.start_step}"


@dataclass(frozen=True)
class ZeroInit(Option):
    """Zero-init, the other half of the paper of CFG-Zero*: no velocity in the first steps.

    Attributes:
        zero_steps: how many; the authors use 1 for image-to-video.
    """

    zero_steps: int = 1

    def check(self, run: Run) -> None:
        if not run.asked:
            own = run.own_steps
            raise Refusal(
                f"cfg_star.zero_init_steps is {self.zero_steps} and the model has {len(own)} of {run.steps} "
                "steps; it would never run",
                "Set 0 (off) or 1",
            )

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        first = "step has" if self.zero_steps == 1 else f"{self.zero_steps} steps have"
        yield f"zero-init: the first {first} no velocity"
