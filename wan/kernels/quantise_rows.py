"""Rows in fp8, each with a scale of its own, and GELU before that: one pass over them."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 16


@triton.jit
def _kernel(
    x_ptr, out_ptr, scale_ptr, width,
    LARGEST: tl.constexpr, GELU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = x/scale of one row, whose largest number becomes LARGEST; BLOCK is the next power of two."""
    row = tl.program_id(0).to(tl.int64)  # rows times width pass 2**31
    columns = tl.arange(0, BLOCK)
    mask = columns < width
    x = tl.load(x_ptr + row * width + columns, mask=mask, other=0.0).to(tl.float32)
    if GELU:  # by tanh, as the logistic function: 0.5*(1 + tanh(u)) = sigmoid(2*u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    scale = tl.maximum(tl.max(tl.abs(x), 0) / LARGEST, 1e-12)
    tl.store(out_ptr + row * width + columns, (x / scale).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + row, scale)


def quantise_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Rows [M, K] in 16 bits, contiguous -> (float8_e4m3fn [M, K], scale [M, 1] in float32).

    Args:
        gelu: whether GELU (by tanh, in float32) goes before.
    """
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        launch: Any = _kernel[(rows,)]
        launch(
            x, out, scale, width, LARGEST=torch.finfo(out.dtype).max, GELU=gelu,
            BLOCK=triton.next_power_of_2(width), num_warps=WARPS,
        )  # fmt: skip
    return out, scale
