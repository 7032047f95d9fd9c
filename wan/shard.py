"""One call of the DiT over several processes, each on a device of its own.

Tokens are split: a rank holds some rows of the stream and does all that is done token by token on these.
For self-attention the ranks trade tokens for heads, each attends with some heads among all tokens, and they
trade back (DeepSpeed Ulysses, Jacobs et al., arXiv 2309.14509). Shares may be uneven: nothing is padded, so
nothing is masked.

L tokens in all, l of this rank; N heads, n of this rank; D width of a head; B batch.
"""

from torch import Tensor

from .attention import AttentionFn

ALL = slice(None)


class Shard:
    """Which tokens of a call are here, and how they meet the others. This one has them all."""

    def rows(self, tokens: int) -> slice:
        """Of so many tokens, those that are here."""
        return ALL

    def among(self, attention: AttentionFn, tokens: int) -> AttentionFn:
        """Self-attention of the tokens that are here among all, on top of an attention of whole sequences."""
        return attention

    def whole(self, x: Tensor, tokens: int) -> Tensor:
        """[B, l, C] of each rank -> [B, L, C], on every rank."""
        return x


WHOLE = Shard()
