"""Large float32 matrix products on the CPU by oneDNN; the same numbers up to rounding.

PyTorch gives them to MKL. On 2 cores of a Zen 3, oneDNN's kernels take 0.87 of MKL's time for the layers of
a Wan2.1 block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 10**9  # multiplications; below that the two libraries take the same time


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    if _fits(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # (..., N)
    return F.linear(x, weight, bias)  # (..., N)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight) if bias is None else (x, weight, bias)
    return (
        not torch.compiler.is_compiling()  # inductor calls oneDNN itself
        and all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
        and x.numel() * weight.shape[0] >= MIN_PRODUCTS
        and not torch.is_grad_enabled()  # the operator has no derivative
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # inductor's own operator, undocumented
    )
