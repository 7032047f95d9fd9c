"""The attention contract, its reference, and the other backends that may be installed.

An `AttentionFn` maps q [B, Lq, N, D], k and v [B, Lk, N, D] (N heads of width D) to [B, Lq, N, D]:
softmax(q k^T / sqrt(D)) v, no mask. The model calls nothing else; whoever runs it may inject another.
"""

import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from threading import Lock
from types import MappingProxyType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .refusal import Refusal

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
# PyTorch before 2.6 has no order of preference: it tries the kernels in an order of its own.
_IN_THIS_ORDER = {"set_priority": True} if "set_priority" in signature(sdpa_kernel).parameters else {}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference: PyTorch's scaled dot-product attention. `best_kernels` says on which of its kernels."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, L, D)
    if q.device.type == "cpu":  # its kernel rereads K and V per query block; contiguous heads are faster
        k, v = k.contiguous(), v.contiguous()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # (B, Lq, N, D)


def best_kernels(device: torch.device) -> AbstractContextManager:
    """Context in which `sdpa` tries the fastest kernels of a CUDA device first; elsewhere it does nothing.

    cuDNN's outruns FlashAttention-2 on data-centre GPUs from Hopper on, and before 9.15.1 it errs on lengths
    that are no multiple of 128 (PyTorch issue 169849): where PyTorch itself would not prefer it, flash comes
    first. It is entered once around the model, not in each call, so that a compiled block does not have to
    trace it. The order is the process's: of threads on several GPUs the first sets it for all, and the last
    takes it back.
    """
    if device.type != "cuda":
        return nullcontext()
    fast = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    if (
        torch.cuda.get_device_capability(device)[0] in (9, 10)
        and (torch.backends.cudnn.version() or 0) >= 91501
    ):
        fast.reverse()
    return _kernels.of([*fast, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


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
        name: one of `CHOICES` less auto.
        function: what the model calls.
        quantised: whether it may overflow where sdpa does not.
    """

    name: str
    function: AttentionFn
    quantised: bool = False


@dataclass(frozen=True)
class Backend:
    """A package that brings an attention kernel, and what that kernel can do.

    Attributes:
        module: to import; its `function` takes [B, L, N, D], after `keywords`.
        install: how to get it.
        dtypes: of q, k and v that it takes.
        max_head_dim: largest D; D is a multiple of 8.
        capability: least CUDA compute capability.
        tolerance: largest relative error against sdpa in the same dtype that its rounding explains.
        keywords: arguments of every call.
        quantised: as of `Attention`.
    """

    module: str
    function: str
    install: str
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    capability: tuple[int, int]
    tolerance: float
    keywords: tuple[tuple[str, object], ...] = ()
    quantised: bool = False


_HALF = (torch.float16, torch.bfloat16)
BACKENDS = {
    "flash": Backend("flash_attn", "flash_attn_func", "pip install flash-attn", _HALF, 256, (8, 0), 0.02),
    "sage": Backend(
        "sageattention", "sageattn", "pip install sageattention (2.x: github.com/thu-ml/SageAttention)",
        _HALF, 128, (8, 0), 0.1, (("tensor_layout", "NHD"),), quantised=True,
    ),
    "xformers": Backend(
        "xformers.ops", "memory_efficient_attention", "pip install xformers",
        (*_HALF, torch.float32), 256, (7, 5), 0.02,
    ),
}  # fmt: skip
MARGIN = 1.15  # by which a backend must be faster than those before it
PROBE_TOKENS = 4099  # enough to time a kernel; no multiple of 128, as real lengths are not
# Keys up to which a quantised backend is left aside: a text has 512, a first and a last image 2 x 257. On an
# H200, SageAttention 1.0.6 errs by 0.13 with 257 keys and by less than 0.1 with 1560.
FEW_KEYS = 514
CHOICES = ("auto", "sdpa", *BACKENDS)
SDPA = Attention("sdpa", sdpa)


def choose_attention(
    name: str,
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    barred: Mapping[str, str] = MappingProxyType({}),
) -> Attention:
    """The backend for a model on a device.

    Args:
        name: one of `CHOICES`; `auto` takes the fastest of the exact ones, as `fastest` says.
        device, dtype: that q, k and v will have.
        head_dim: D.
        barred: backends that must not be used, and why, as the end of "attention is NAME, and ...".

    Raises:
        Refusal: an explicit choice is not installed, or cannot do this; says what is and how to get it.
    """
    if name == "sdpa":
        return SDPA
    device = torch.device(device)
    if name == "auto":
        return fastest(device, dtype, head_dim, tuple(n for n in BACKENDS if n not in barred))

    def obstacle(name: str) -> str | None:
        return barred.get(name) or _obstacle(BACKENDS[name], device, dtype, head_dim)

    if problem := obstacle(name):
        usable = ["sdpa", *(other for other in BACKENDS if not obstacle(other))]
        raise Refusal(
            f"attention is {name}, and {problem}; what can be used here: {', '.join(usable)}",
            "Choose one of these, or auto",
        )
    return _bound(name)


@cache
def fastest(device: torch.device, dtype: torch.dtype, head_dim: int, names: tuple[str, ...]) -> Attention:
    """The fastest backend that is exact and agrees with sdpa, probed once a device, dtype and head size.

    A quantised one gives another video and is taken by name only. The others round in different ways too, so
    each must beat those before it by `MARGIN`: two that are as fast would else take turns between restarts.

    Args:
        names: of the backends that may be taken.
    """
    exact = [name for name in names if not BACKENDS[name].quantised]
    exact = [name for name in exact if _obstacle(BACKENDS[name], device, dtype, head_dim) is None]
    if not exact:
        return SDPA
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, PROBE_TOKENS, 8, head_dim, generator=g).to(device, dtype) for _ in range(3))
    expected = sdpa(q, k, v).float()
    best = SDPA
    with best_kernels(device):
        least = _seconds(sdpa, q, k, v)
    for name in exact:
        candidate = _bound(name)
        if _agrees(candidate.function, (q, k, v), expected, BACKENDS[name].tolerance):
            seconds = _seconds(candidate.function, q, k, v)
            if MARGIN * seconds < least:
                best, least = candidate, seconds
    return best


def _agrees(
    function: AttentionFn, qkv: tuple[Tensor, Tensor, Tensor], expected: Tensor, tolerance: float
) -> bool:
    try:
        out = function(*qkv).float()
    except Exception:  # another package's kernel may raise anything; auto then leaves it out
        return False
    return bool((out - expected).norm() <= tolerance * expected.norm())  # False for NaN


def _seconds(function: AttentionFn, q: Tensor, k: Tensor, v: Tensor, calls: int = 5) -> float:
    function(q, k, v)
    torch.cuda.synchronize(q.device)
    start = time.perf_counter()
    for _ in range(calls):
        function(q, k, v)
    torch.cuda.synchronize(q.device)
    return (time.perf_counter() - start) / calls


def _obstacle(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot do this, or None."""
    module = _import(backend.module)
    package = backend.module.split(".")[0]
    if isinstance(module, Exception):
        what = "is not installed" if isinstance(module, ModuleNotFoundError) else f"does not load ({module})"
        return f"{package} {what}; get it with {backend.install}"
    if not hasattr(module, backend.function):  # an incompatible version, or a failed partial install
        return f"{package} has no {backend.function}; get it with {backend.install}"
    if device.type != "cuda":
        return f"it needs a CUDA device and the model runs on {device.type}"
    if dtype not in backend.dtypes:
        names = ", ".join(str(d).removeprefix("torch.") for d in backend.dtypes)
        return f"it works in {names} and the model in {str(dtype).removeprefix('torch.')}"
    if head_dim > backend.max_head_dim or head_dim % 8:
        return (
            f"its heads are multiples of 8 up to {backend.max_head_dim} and the model's are {head_dim} wide"
        )
    capability = torch.cuda.get_device_capability(device)
    if capability < backend.capability:
        needed, have = (".".join(map(str, c)) for c in (backend.capability, capability))
        return f"it needs compute capability {needed} and the device has {have}"
    return None


@cache
def _import(module: str) -> ModuleType | Exception:
    """The module, or the error where it is missing or does not load (built for another torch or CUDA)."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # another package's import may raise anything
        return error


def _bound(name: str) -> Attention:
    backend = BACKENDS[name]
    function: AttentionFn = partial(
        getattr(_import(backend.module), backend.function), **dict(backend.keywords)
    )
    if backend.quantised:
        function = partial(_among_many_keys, function)
    return Attention(name, function, backend.quantised)


def _among_many_keys(function: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`function`, but sdpa where keys are few: text and image gain no time in 8 bits and lose the most."""
    return function(q, k, v) if k.shape[1] > FEW_KEYS else sdpa(q, k, v)
