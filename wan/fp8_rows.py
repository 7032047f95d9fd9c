"""Products in fp8 whose input has a scale for each row: PyTorch's operations, and the kernels for them.

M tokens, K and N widths.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels

FP8 = torch.float8_e4m3fn
CHECK_ROWS = 64  # on which a kernel is compared
ROWS_AT_ONCE = 4096  # of PyTorch's own operations, which make copies in float32
SIDES = 16  # widths of a product are multiples of it


def quantised_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Rows [M, K] -> (float8_e4m3fn [M, K], scale [M, 1] in float32); see `_quantised_rows`."""
    choice = _choice("quantise_rows", x.device, x.dtype, x.shape[-1])
    if choice.function:
        return choice.function(x.contiguous(), gelu)
    rows, scale = x.new_empty(x.shape, dtype=FP8), x.new_empty(len(x), 1, dtype=torch.float32)
    for i in range(0, len(x), ROWS_AT_ONCE):
        some = slice(i, i + ROWS_AT_ONCE)
        rows[some], scale[some] = _quantised_rows(x[some], gelu)
    return rows, scale


def product_of(
    device: torch.device, dtype: torch.dtype, width: int, hidden: int
) -> Callable[..., Tensor] | None:
    """The product of such rows, see `kernels.row_product`; None where the device does not have it.

    Args:
        width, hidden: K and N.
    """
    if width % SIDES or hidden % SIDES:
        return None
    return _choice("row_product", device, dtype, width).function


def choices(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, kernels.Choice]:
    """Which of both a device takes for rows of this width, by name."""
    return {name: _choice(name, device, dtype, width) for name in _DISTANCES}


def _quantised_rows(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """The reference: the largest number of a row becomes the largest of fp8."""
    x = F.gelu(x.float(), approximate="tanh") if gelu else x.float()
    scale = (x.abs().amax(-1, keepdim=True) / torch.finfo(FP8).max).clamp_min(1e-12)
    return (x / scale).to(FP8), scale


def _choice(name: str, device: torch.device, dtype: torch.dtype, width: int) -> kernels.Choice:
    return kernels.choose(name, device, dtype, (width,), partial(_DISTANCES[name], device, dtype, width))


@torch.no_grad()
def _rows_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    x = _random(CHECK_ROWS, width).to(device, dtype)
    return max(
        kernels.relative(_wide(kernel(x, gelu)), _wide(_quantised_rows(x, gelu))) for gelu in (False, True)
    )


@torch.no_grad()
def _product_distance(device: torch.device, dtype: torch.dtype, width: int, kernel: Callable) -> float:
    x, weight, bias = (_random(*shape) for shape in ((2, CHECK_ROWS, width), (1,), (CHECK_ROWS,)))
    x[0] *= torch.logspace(-2, 2, CHECK_ROWS)[:, None]
    rows, matrix = (_quantised_rows(part.to(device), False) for part in x)
    scale, bias = weight[0].abs().to(device), bias.to(device, dtype)
    expected = F.linear(_wide(rows), matrix[0].float() * scale, bias.float())
    return kernels.relative(kernel(*rows, matrix[0], scale, bias, dtype), expected)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _wide(rows: tuple[Tensor, Tensor]) -> Tensor:
    return rows[0].float() * rows[1]


_DISTANCES: dict[str, Callable[..., Any]] = {
    "quantise_rows": _rows_distance,
    "row_product": _product_distance,
}
