"""The attention contract and its reference, with the order of PyTorch's kernels.

An `AttentionFn` maps q [B, Lq, N, D], k and v [B, Lk, N, D] (N heads of width D) to [B, Lq, N, D]:
softmax(q k^T / sqrt(D)) v, no mask. The model calls nothing else; whoever runs it may inject another.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from inspect import signature
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
# PyTorch before 2.6 has no order of preference: it tries the kernels in an order of its own.
_IN_THIS_ORDER = {"set_priority": True} if "set_priority" in signature(sdpa_kernel).parameters else {}
KERNELS = {  # of `sdpa`: those that spare the matrix of all scores, by the name they are told by
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
CUDNN_VERSION = 91501  # before, it errs on lengths that are no multiple of 128 (PyTorch issue 169849)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: PyTorch's scaled dot-product attention. `best_kernels` says on which of its kernels."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, L, D)
    if q.device.type == "cpu":  # its kernel rereads K and V per query block; contiguous heads are faster
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, Lq, N, D)


def best_kernels(device: torch.device, first: str | None = None) -> AbstractContextManager:
    """Context in which `sdpa` tries the fastest kernels of a CUDA device first; elsewhere it does nothing.

    It is entered once around the model, not in each call, so that a compiled block does not have to
    trace it. The order is the process's: of threads on several GPUs the first sets it for all, and the last
    takes it back.

    Args:
        first: the kernel of `KERNELS` that was found to be the fastest; None for `kernel_order`.
    """
    if device.type != "cuda":
        return nullcontext()
    order = kernel_order(device)
    if first is not None:
        others = [name for name in order if name != first]
        order = [first, *(others if _IN_THIS_ORDER else ["efficient"])]
    return only_kernels(*order, others=(SDPBackend.MATH,))


def kernel_order(device: torch.device) -> list[str]:
    """The kernels of a CUDA device, the one that is most likely the fastest first, as PyTorch itself has it.

    cuDNN's outruns FlashAttention-2 on data-centre GPUs from Hopper on, unless it is too old.
    """
    order = list(KERNELS)
    if torch.cuda.get_device_capability(device)[0] in (9, 10) and has_cudnn():
        order[:2] = reversed(order[:2])
    return order


def has_cudnn() -> bool:
    """Whether cuDNN's kernel may be tried."""
    return (torch.backends.cudnn.version() or 0) >= CUDNN_VERSION


def only_kernels(*names: str, others: tuple[SDPBackend, ...] = ()) -> AbstractContextManager:
    """Context in which `sdpa` has these kernels of `KERNELS`, in this order, and then others."""
    return _kernels.of([*(KERNELS[name] for name in names), *others])


class _Kernels:
    """`sdpa_kernel` for threads: each alone would take back what another has set."""

    def __init__(self):
        self.lock = Lock()
        self.inside = 0
        self.order = ExitStack()

    @contextmanager
    def of(self, backends: list[SDPBackend]) -> Iterator[None]:
        with self.lock:
            if not self.inside:
                self.order.enter_context(sdpa_kernel(backends, **_IN_THIS_ORDER))
            self.inside += 1
        try:
            yield
        finally:
            with self.lock:
                self.inside -= 1
                if not self.inside:
                    self.order.close()


_kernels = _Kernels()


@dataclass(frozen=True)
class Attention:
    """A backend ready to be called.

    Attributes:
        name: one of `wan.backends.CHOICES` less auto.
        function: what the model calls.
        quantised: whether it may overflow where sdpa does not.
        kernel: for sdpa, the one of `KERNELS` to try first; None for the order of `best_kernels`.
        seconds: of one self-attention, by what was tried beside each other; see `wan.probe`.
    """

    name: str
    function: AttentionFn
    quantised: bool = False
    kernel: str | None = None
    seconds: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class AttentionSize:
    """What one self-attention works on: L tokens of one sample, N heads of width D."""

    tokens: int
    heads: int
    head_dim: int


SDPA = Attention("sdpa", sdpa)
