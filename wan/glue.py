"""What lies between the matrix products and the attention: norms, modulation, residual steps, RoPE.

B batch, L tokens, D width, N heads. The stream x is [B, L, D] in float32; what goes into a product is in the
compute dtype. A residual step stands together with the norm that reads its result, so that one pass over the
stream can do both.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inplace import may_overwrite
from .rope import apply_rope


def modulated(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """adaLN: LayerNorm(x)*(1 + scale) + shift in float32, then `dtype`. x [B, L, D], the others [B, 1, D]."""
    if x.shape[0] == 1:  # one kernel: the modulation is the norm's affine part
        y = F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
    else:
        y = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1 + scale)
    return y.to(dtype)  # (B, L, D)


def added(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Residual step x + y*gate, in x's dtype; on the stream itself where it `may_overwrite`.

    Args:
        x, y: of one shape, [B, L, D] in the blocks.
        gate: [B, 1, D], or None for 1.
    """
    if may_overwrite():  # y is widened while it is read: no float32 copy of it
        return x.add_(y) if gate is None else x.addcmul_(y, gate)
    return x + y if gate is None else torch.addcmul(x, y.float(), gate)


def added_then_modulated(
    x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`added` without a gate, and `modulated` of that."""
    x = added(x, y)
    del y  # free before the norm takes room, where the caller kept no name for it
    return x, modulated(x, shift, scale, eps, dtype)


def added_then_normed(
    x: Tensor, y: Tensor, gate: Tensor, norm: nn.Module, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`added`, and a layer `norm` of that, in float32 and then `dtype`."""
    x = added(x, y, gate)
    del y
    return x, norm(x).to(dtype)


def normed_heads(x: Tensor, norm: nn.Module, heads: int, rope: Tensor | None = None) -> Tensor:
    """Queries or keys [B, L, D] -> [B, L, N, D/N]: RMSNorm over all heads together, then turned by `rope`.

    Args:
        norm: the layer.
        heads: N.
        rope: from `rope_table`, the rows of these tokens; None turns nothing.
    """
    x = norm(x).unflatten(-1, (heads, -1))
    return x if rope is None else apply_rope(x, rope)
