"""Large float32 matrix products on the CPU by the faster of two libraries; the same numbers up to rounding.

PyTorch gives them to MKL. Which is faster is a matter of the CPU: for the layers of a Wan2.1 block oneDNN
took 0.87 of MKL's time on 2 cores of a Zen 3 and 0.83 on a Zen 4; on an Intel Xeon with AMX a whole step took
1.17 of it.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_PRODUCTS = 10**9  # multiplications; below that the two libraries take the same time
PROBED_PRODUCTS = 4 * 10**9  # multiplications of a call of the probe, at most: a tenth of a second
MARGIN = 1.05  # by which MKL must be faster: as fast, the two would take turns between restarts
CALLS = 3  # of each library in the probe; the best counts, as another program may take the core meanwhile


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x [..., K], weight [N, K], bias [N] or None -> [..., N]."""
    if _fits(x, weight, bias) and _onednn_is_faster(torch.get_num_threads(), weight):
        return _by_onednn(x, weight, bias)  # (..., N)
    return F.linear(x, weight, bias)  # (..., N)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


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


_faster: dict[int, bool] = {}  # by the number of threads


def _onednn_is_faster(threads: int, weight: Tensor) -> bool:
    """Whether oneDNN is not the slower one on this CPU, timed once a process on the first layer that asks."""
    if threads not in _faster:
        columns, rows = weight.shape[1], max(1, PROBED_PRODUCTS // weight.numel())
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
        ours, theirs = _seconds((_by_onednn, F.linear), x, weight)
        _faster[threads] = ours < MARGIN * theirs
    return _faster[threads]


def _seconds(functions: tuple[Callable, ...], x: Tensor, weight: Tensor) -> list[float]:
    """The shortest of `CALLS` calls of each, which take turns."""
    least = [float("inf")] * len(functions)
    for _ in range(CALLS):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function(x, weight, None)
            least[i] = min(least[i], time.perf_counter() - start)
    return least
