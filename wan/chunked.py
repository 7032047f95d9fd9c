"""A transformer block done on one part of the tokens after the other.

Only self-attention needs all tokens at once. What the rest makes on the way is then as large as a part, the
numbers are the same up to rounding, and each layer's weights are used once a part.

B batch, L tokens, D width, N heads, T text tokens, I image tokens.
"""

from functools import partial
from typing import Any

from torch import Tensor

from .attention import AttentionFn
from .changed import is_changed
from .dit import AttendText, BlockExecutor, WanAttentionBlock, at_once, attend_text
from .inplace import may_overwrite


def block_executor(parts: int) -> BlockExecutor:
    """An executor for `WanModel.forward`: each block in so many parts; with 1 its own forward."""
    return at_once if parts == 1 else partial(_in_parts_or_whole, parts=parts)


def _in_parts_or_whole(block: WanAttentionBlock, *inputs: Any, parts: int) -> Tensor:
    """A block that somebody has changed, hooked or put there is called, whatever memory that takes."""
    is_ours = type(getattr(block, "_orig_mod", block)) is WanAttentionBlock
    return (
        in_parts(block, *inputs, parts=parts)
        if is_ours and not is_changed(block)
        else at_once(block, *inputs)
    )


def in_parts(
    block: WanAttentionBlock,
    x: Tensor,
    modulation: Tensor,
    text: Tensor,
    image: Tensor | None,
    rope: Tensor,
    attention: AttentionFn,
    attend: AttendText = attend_text,
    among: AttentionFn | None = None,
    *,
    parts: int,
) -> Tensor:
    """`WanAttentionBlock.forward` by parts of the tokens. x is changed in place: no gradients.

    Args:
        block: whose weights are used.
        x: [B, L, D].
        modulation, text, image, rope, attention, attend, among: as for the block.
        parts: how many pieces the L tokens are cut into.

    Returns:
        x.
    """
    assert may_overwrite(), "tokens are changed in place"
    dtype = text.dtype
    e = block.modulations(modulation)  # 6 x (B, 1, D)
    heads = (*x.shape[:2], block.self_attn.num_heads, x.shape[2] // block.self_attn.num_heads)
    q, k, v = (x.new_empty(heads, dtype=dtype) for _ in range(3))  # 3 x (B, L, N, D/N)
    for rows, turns, *places in zip(*(t.chunk(parts, dim=1) for t in (x, rope.unsqueeze(0), q, k, v))):
        _store(places, block.qkv(rows, e, turns, dtype))
    y = (among or attention)(q, k, v).flatten(2)  # (B, L, D)
    del q, k, v, places
    for rows, found in zip(x.chunk(parts, dim=1), y.chunk(parts, dim=1)):
        rows, normed = block.attended(rows, found, e, dtype)
        rows, normed = block.crossed(rows, normed, e, text, image, attention, attend)
        block.fed_forward(rows, normed, e)
    return x  # (B, L, D)


def _store(places: list[Tensor], values: tuple[Tensor, ...]) -> None:
    for place, value in zip(places, values):
        place.copy_(value)
