"""Wan's RMSNorm, over all heads of a token together, and the rotation after it, in one pass."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def _kernel(
    x_ptr, weight_ptr, table_ptr, out_ptr, width, eps,
    HEAD: tl.constexpr, HAS_TABLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = RMSNorm(x)*weight of one row, each pair of channels turned; BLOCK is the next power of two."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    y = (x * scale * weight).to(out_ptr.dtype.element_ty)  # rounded where the layer rounds
    if HAS_TABLE:
        turns = tl.load(table_ptr + row * HEAD + columns % HEAD)  # the same for all heads
        a, b = tl.split(tl.reshape(y.to(tl.float32), [BLOCK // 2, 2]))
        cos, sin = tl.split(tl.reshape(turns, [BLOCK // 2, 2]))
        turned = tl.join(a * cos - b * sin, a * sin + b * cos)
        y = tl.reshape(turned, [BLOCK]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * width + columns, y, mask=mask)


def rms_rope(x: Tensor, weight: Tensor, eps: float, heads: int, table: Tensor | None) -> Tensor:
    """RMSNorm over the last dimension, then RoPE of interleaved pairs in float32.

    Args:
        x: [B, L, D] in 16 bits, the rows of a sample one after the other.
        weight: [D].
        heads: N.
        table: (cos, sin) [L, 1, D/N/2, 2], float32, contiguous; None turns nothing.

    Returns:
        [B, L, N, D/N]
    """
    batch, rows, width = x.shape
    assert table is None or (table.is_contiguous() and table.numel() == rows * (width // heads))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        for i in range(batch):
            launch: Any = _kernel[(rows,)]
            launch(
                x[i], weight, x if table is None else table, out[i], width, eps,
                HEAD=width // heads, HAS_TABLE=table is not None,
                BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
            )  # fmt: skip
    return out.unflatten(-1, (heads, -1))
