"""Normalized Attention Guidance: the negative prompt acts inside cross-attention, at guidance 1 too.

Chen et al., https://arxiv.org/abs/2505.21179. It costs a second cross-attention to the text, no second pass.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.linalg import vector_norm

from .attention import AttentionFn
from .dit import AttendText, Pass, WanCrossAttention, attend_text
from .memory import StepSize
from .option import EditCall, EmbedTime, Option, Run, SampleRecord
from .refusal import Refusal


def nag(positive: Tensor, negative: Tensor, scale: float, tau: float, alpha: float) -> Tensor:
    """What tokens found in the positive text, led away from what they found in the negative one.

    Args:
        positive, negative: [B, L, N, D/N], before the projection `o`.
        scale: of the guidance; 1 is none.
        tau: the most that the L1 norm of a token may grow by.
        alpha: share of the guided result, in [0, 1].

    Returns:
        As `positive`, worked out in float32.
    """
    z = positive.flatten(2).float()  # (B, L, D)
    guided = z.lerp(negative.flatten(2).float(), 1 - scale)  # z + (scale - 1) * (z - negative): (B, L, D)
    norm, guided_norm = (vector_norm(t, 1, dim=-1, keepdim=True) for t in (z, guided))  # 2 x (B, L, 1)
    shrink = (tau * norm / (guided_norm + 1e-7)).where(guided_norm > tau * norm, 1.0)  # (B, L, 1)
    guided = guided * shrink
    return z.lerp(guided, alpha).to(positive).view_as(positive)


@dataclass(frozen=True)
class Nag(Option):
    """`nag` in the pass of the positive prompt. The image branch is added after it, untouched.

    Attributes:
        scale: 11 is usual for Wan.
        tau: 2.5.
        alpha: 0.25.
    """

    scale: float = 11.0
    tau: float = 2.5
    alpha: float = 0.25
    needs_negative = True

    def check(self, run: Run) -> None:
        if self.scale < 1:
            raise Refusal(f"nag.scale is {self.scale:g}; 1 is none, and it grows from there", "Set 11")
        if self.tau <= 0:
            raise Refusal(f"nag.tau is {self.tau:g}; it must be above 0", "Set 2.5")
        if not 0 <= self.alpha <= 1:
            raise Refusal(f"nag.alpha is {self.alpha:g}; it is a share, from 0 to 1", "Set 0.25")

    def idle(self, run: Run) -> str | None:
        if self.scale == 1 or self.alpha == 0:
            return "nag has no effect at scale 1 or alpha 0"
        return None

    def sized(self, size: StepSize) -> StepSize:
        return replace(size, nag=True)

    def begin(self, run: Run, embed_time: EmbedTime, record: SampleRecord) -> EditCall | None:
        return lambda call: replace(call, context_attention=self._context_attention)

    def report(self, run: Run, record: SampleRecord) -> Iterable[str]:
        yield f"nag: scale {self.scale:g}, tau {self.tau:g}, alpha {self.alpha:g}"

    def _context_attention(self, p: Pass, texts: Mapping[str, Tensor]) -> AttendText:
        if p.name != "cond":
            return attend_text

        def attend(cross: WanCrossAttention, q: Tensor, text: Tensor, attention: AttentionFn) -> Tensor:
            positive, negative = (attend_text(cross, q, t, attention) for t in (text, texts["uncond"]))
            return nag(positive, negative, self.scale, self.tau, self.alpha)

        return attend
