"""A residual step and the norm that reads its result, in one pass over the stream.

One program a token, which stays in registers from its load to its last store.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 8


@triton.jit
def _kernel(
    x_ptr, y_ptr, gate_ptr, weight_ptr, bias_ptr, out_ptr, width, eps,
    HAS_Y: tl.constexpr, HAS_GATE: tl.constexpr, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x += y*gate, and out = LayerNorm(x)*weight + bias, of one row; BLOCK is the next power of two."""
    row = tl.program_id(0).to(tl.int64)  # rows times width pass 2**31
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    at = row * width + columns
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if HAS_Y:
        y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_GATE:
            y = y * tl.load(gate_ptr + columns, mask=mask, other=0.0)
        x = x + y
        tl.store(x_ptr + at, x, mask=mask)
    if HAS_NORM:
        mean = tl.sum(x, 0) / width
        centred = tl.where(mask, x - mean, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
        weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0)
        normed = centred * scale * weight + bias
        tl.store(out_ptr + at, normed.to(out_ptr.dtype.element_ty), mask=mask)


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    affine: tuple[Tensor, Tensor] | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor | None:
    """x += y*gate, then LayerNorm(x)*weight + bias; without y the stream stays as it is.

    Args:
        x: the stream [B, L, D], float32, the rows of a sample one after the other; changed in place.
        y: [B, L, D] in 16 bits, laid out in the same way, or None.
        gate: [B, 1, D], float32, or None for 1.
        affine: weight and bias, each [B, 1, D] or [D], float32; None for the residual step alone.
        dtype: of the result.

    Returns:
        [B, L, D], or None without `affine`.
    """
    batch, rows, width = x.shape
    out = None if affine is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    weight, bias = (None, None) if affine is None else (t.expand(batch, 1, width) for t in affine)
    with torch.cuda.device_of(x):
        for i in range(batch):
            # What is missing is never read, but the kernel wants a pointer.
            part = [x[i] if t is None else t[i] for t in (x, y, gate, weight, bias, out)]
            launch: Any = _kernel[(rows,)]
            launch(
                *part, width, eps, HAS_Y=y is not None, HAS_GATE=gate is not None,
                HAS_NORM=out is not None, BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
            )  # fmt: skip
    return out
