"""A product in fp8 with a scale for each row: cuBLASLt's and CUTLASS's, by way of PyTorch. No Triton."""

import torch
from torch import Tensor


def row_product(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """(x*x_scale) @ (weight*weight_scale).T + bias -> [M, N] in `dtype`.

    Args:
        x, weight: [M, K] and [N, K] in float8_e4m3fn.
        x_scale: [M, 1], float32.
        weight_scale: one number, float32.
    """
    scales = weight_scale.reshape(1, 1).expand(1, len(weight)).contiguous()
    # Without the fast sums of Hopper a scale for each row is far slower (PyTorch issue 147971).
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage] (nothing public on all versions)
    y = multiply(x, weight.t(), x_scale, scales, out_dtype=dtype, use_fast_accum=True)
    return y if bias is None else y.add_(bias)
