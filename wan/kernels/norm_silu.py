"""The VAE's norm and the SiLU after it, in one pass over pixels whose channels lie side by side."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 4
TILE = (
    2048  # numbers of a program: several pixels of few channels, since one alone is too little to hide a load
)


@triton.jit
def _kernel(
    x_ptr, gamma_ptr, out_ptr, pixels, width, scale, largest, PIXELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = silu(x / |x| * scale * gamma) of some pixels; BLOCK is the next power of two."""
    rows = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)  # times width they pass 2**31
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    mask = (rows < pixels)[:, None] & inside[None, :]
    at = rows[:, None] * width + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1))
    factor = tl.minimum(scale / tl.maximum(length, 1e-12), largest)
    gamma = tl.load(gamma_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    y = x * factor[:, None] * gamma[None, :]
    tl.store(out_ptr + at, (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty), mask=mask)


def norm_silu(x: Tensor, gamma: Tensor, scale: float, out: Tensor) -> None:
    """Writes silu(norm(x)) into `out`, computed in float32.

    Args:
        x, out: [B, C, f, H, W]; in each sample the channels of a pixel, and the pixels, lie side by side.
        gamma: [C], contiguous.
        scale: length of a pixel's normed vector.
    """
    batch, width = x.shape[:2]
    pixels, block = x[0, 0].numel(), triton.next_power_of_2(width)
    largest, several = torch.finfo(x.dtype).max, max(1, TILE // block)
    with torch.cuda.device_of(x):
        for i in range(batch):
            launch: Any = _kernel[(triton.cdiv(pixels, several),)]
            launch(
                x[i], gamma, out[i], pixels, width, scale, largest,
                PIXELS=several, BLOCK=block, num_warps=WARPS,
            )  # fmt: skip
