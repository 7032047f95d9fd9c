"""A convolution's bias and the residual step after it, in one pass over pixels with channels side by side."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
TILE = 2048  # numbers of a program


@triton.jit
def _kernel(
    y_ptr, bias_ptr, add_to_ptr, pixels, width,
    HAS_RESIDUAL: tl.constexpr, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y += bias + add_to of some pixels; BLOCK is the next power of two."""
    rows = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)  # times width they pass 2**31
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    mask = (rows < pixels)[:, None] & inside[None, :]
    at = rows[:, None] * width + columns[None, :]
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    y = y.to(y_ptr.dtype.element_ty)  # rounded where the convolution rounds
    if HAS_RESIDUAL:
        y = y.to(tl.float32) + tl.load(add_to_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def add_bias(y: Tensor, bias: Tensor, add_to: Tensor | None) -> None:
    """Adds bias and residual to y, in place.

    Args:
        y: [B, D, f, H, W]; in each sample the channels of a pixel, and the pixels, lie side by side.
        bias: [D], contiguous.
        add_to: as y, or None.
    """
    batch, width = y.shape[:2]
    pixels, block = y[0, 0].numel(), triton.next_power_of_2(width)
    several = max(1, TILE // block)
    with torch.cuda.device_of(y):
        for i in range(batch):
            residual = y[i] if add_to is None else add_to[i]  # not read where there is none
            launch: Any = _kernel[(triton.cdiv(pixels, several),)]
            launch(
                y[i], bias, residual, pixels, width,
                HAS_RESIDUAL=add_to is not None, PIXELS=several, BLOCK=block, num_warps=WARPS,
            )  # fmt: skip
