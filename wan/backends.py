"""Attention kernels that other packages bring, and the choice among them and PyTorch's own."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from types import MappingProxyType, ModuleType
from typing import cast

import torch
from torch import Tensor

from .attention import SDPA, Attention, AttentionFn, AttentionSize, sdpa
from .probe import MARGIN, TOLERANCE, Candidate, MakeRoom, fastest
from .refusal import Refusal


@dataclass(frozen=True)
class Backend:
    """A package that brings an attention kernel, and what that kernel can do.

    Attributes:
        module: to import; its `function` takes q, k and v, after `keywords`.
        install: how to get it.
        dtypes: of q, k and v that it takes.
        max_head_dim: largest D; D is a multiple of 8.
        capability: least CUDA compute capability.
        newest: largest major number of that, or None.
        tolerance: largest relative error against sdpa in the same dtype that its rounding explains.
        keywords: arguments of every call.
        heads_first: whether it takes and gives [B, N, L, D] in place of [B, L, N, D].
        is_traced: whether torch.compile may look into it.
        quantised: as of `Attention`.
        over_flash: how many times as fast as sdpa's flash kernel it is by published figures, for heads of 128
            and long videos, by compute capability.
    """

    module: str
    function: str
    install: str
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    capability: tuple[int, int]
    newest: int | None = None
    tolerance: float = TOLERANCE
    keywords: Mapping[str, object] = field(default_factory=dict)
    heads_first: bool = False
    is_traced: bool = True
    quantised: bool = False
    over_flash: Mapping[tuple[int, int], float] = field(default_factory=dict)


_HALF = (torch.float16, torch.bfloat16)
BACKENDS = {
    "flash": Backend("flash_attn", "flash_attn_func", "pip install flash-attn", _HALF, 256, (8, 0)),
    # TFLOP/s on an H100 with 16k tokens: 648, FlashAttention-2 370 (arXiv 2407.08608). Its wheels for newer
    # GPUs have no kernel.
    "flash3": Backend(
        "flash_attn_interface", "flash_attn_func",
        "pip install flash-attn-3 --index-url https://download.pytorch.org/whl/cu130 (for CUDA 13)",
        _HALF, 256, (9, 0), newest=9, is_traced=False, over_flash={(9, 0): 1.75},
    ),
    # 572 TFLOP/s on an H100 (pith-train, pull request 2).
    "flash4": Backend(
        "flash_attn.cute", "flash_attn_func", "pip install flash-attn-4", _HALF, 128, (8, 0),
        is_traced=False, over_flash={(9, 0): 1.55},
    ),
    # 2.1 times (arXiv 2410.02367) and, for 2.x, about 3 times on an RTX 4090 (arXiv 2411.10958); on an H100
    # with 32k tokens 882 TFLOP/s (the project's chart).
    "sage": Backend(
        "sageattention", "sageattn", "pip install sageattention (2.x: github.com/thu-ml/SageAttention)",
        _HALF, 128, (8, 0), tolerance=0.1, keywords={"tensor_layout": "NHD"}, quantised=True,
        over_flash={(8, 6): 2.1, (8, 9): 3.0, (9, 0): 2.4},
    ),
    "kitchen": Backend(
        "comfy_kitchen.sage_attention", "int8_attention", "pip install -U comfy-kitchen (0.2.30 or newer)",
        (*_HALF, torch.float32), 256, (7, 5), tolerance=0.1, heads_first=True, is_traced=False,
        quantised=True,
    ),
    "xformers": Backend(
        "xformers.ops", "memory_efficient_attention", "pip install xformers",
        (*_HALF, torch.float32), 256, (7, 5),
    ),
}  # fmt: skip
# Keys up to which a quantised backend is left aside: a text has 512, a first and a last image 2 x 257. On an
# H200, SageAttention 1.0.6 errs by 0.13 with 257 keys and by less than 0.1 with 1560.
FEW_KEYS = 514
CHOICES = ("auto", "sdpa", *BACKENDS)
NOTHING_BARRED: Mapping[str, str] = MappingProxyType({})
SMALL = 64  # tokens on which a backend that was named is run before anything else is


def choose_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    size: AttentionSize,
    barred: Mapping[str, str] = NOTHING_BARRED,
    make_room: MakeRoom | None = None,
) -> Attention:
    """The attention for a model on a device.

    Args:
        name: one of `CHOICES`. `auto` takes the fastest of the exact ones: a quantised one gives another
            video and is taken by name only. Of sdpa the fastest kernel is taken.
        device, dtype: that q, k and v will have.
        size: of a self-attention of the run.
        barred: backends that must not be used, and why, as the end of "attention is NAME, and ...".
        make_room: as of `fastest`.

    Raises:
        Refusal: an explicit choice is not installed, or cannot do this; says what is and how to get it.
    """
    if name == "sdpa":
        return fastest(device, dtype, size, make_room=make_room)
    if name != "auto":
        return named_attention(name, device, dtype, size.head_dim, barred)
    exact = [other for other, backend in BACKENDS.items() if other not in barred and not backend.quantised]
    usable = [other for other in exact if not _obstacle(BACKENDS[other], device, dtype, size.head_dim)]
    others = [Candidate(other, _bound(other), tolerance=BACKENDS[other].tolerance) for other in usable]
    return fastest(device, dtype, size, others, make_room)


def named_attention(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    barred: Mapping[str, str] = NOTHING_BARRED,
) -> Attention:
    """An attention by its name, as of `choose_attention`; nothing is timed."""
    if name == "sdpa":
        return SDPA

    def obstacle(name: str) -> str | None:
        return barred.get(name) or _obstacle(BACKENDS[name], device, dtype, head_dim)

    if problem := obstacle(name) or _failure(name, device, dtype, head_dim):
        usable = ["sdpa", *(other for other in BACKENDS if other != name and not obstacle(other))]
        raise Refusal(
            f"attention is {name}, and {problem}; what can be used here: {', '.join(usable)}",
            "Choose one of these, or auto",
        )
    return _bound(name)


def attentions_to_get(
    chosen: Attention,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    barred: Mapping[str, str] = NOTHING_BARRED,
) -> str:
    """What packages that are not installed would give on a device, for the report; empty if nothing.

    Args:
        chosen: as from `choose_attention`, with the seconds of what was tried: a published figure tells
            how much faster than sdpa's flash kernel one is, and that was timed here.
    """
    took = dict(chosen.seconds)
    flash = took.get("sdpa flash")
    now = took.get(f"sdpa {chosen.kernel}" if chosen.kernel else chosen.name)
    if flash is None or now is None:
        return ""
    capability = torch.cuda.get_device_capability(device)
    told = []
    for name, backend in BACKENDS.items():
        gain = now / flash * backend.over_flash.get(capability, 0.0)
        if gain < MARGIN or name in barred or _unfit(backend, device, dtype, head_dim):
            continue
        if isinstance(_import(backend.module), ModuleNotFoundError):
            kind = "8 bits, used when named" if backend.quantised else "exact"
            told.append(f"{name} ({kind}) about {gain:.1f} times as fast: {backend.install}")
    return "; ".join(told)


def _obstacle(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend cannot do this, or None."""
    module = _import(backend.module)
    package = backend.module.removesuffix(".ops")
    if isinstance(module, Exception):
        what = "is not installed" if isinstance(module, ModuleNotFoundError) else f"does not load ({module})"
        return f"{package} {what}; get it with {backend.install}"
    if not hasattr(module, backend.function):  # an incompatible version, or a failed partial install
        return f"{package} has no {backend.function}; get it with {backend.install}"
    return _unfit(backend, device, dtype, head_dim)


def _unfit(backend: Backend, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a backend could not do this if it were installed, or None."""
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
    needed, have = (".".join(map(str, c)) for c in (backend.capability, capability))
    if capability < backend.capability:
        return f"it needs compute capability {needed} and the device has {have}"
    if backend.newest is not None and capability[0] > backend.newest:
        return f"it is for compute capability {needed} to {backend.newest}.x and the device has {have}"
    return None


def _failure(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """How a backend fails that should be able to do this: a build may lack the kernels of a device."""
    backend, q = BACKENDS[name], torch.ones(1, SMALL, 1, head_dim).to(device, dtype)
    try:
        _called(getattr(_import(backend.module), backend.function), backend, q, q, q)
    except Exception as error:  # another package's kernel may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"it does not run here ({lines[0]})"
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
    function: AttentionFn = partial(_called, getattr(_import(backend.module), backend.function), backend)
    if not backend.is_traced:
        function = cast(AttentionFn, torch.compiler.disable(function))
    if backend.quantised:
        function = partial(_among_many_keys, function)
    return Attention(name, function, backend.quantised)


def _called(function: Callable, backend: Backend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A backend's function in its own layout; some give the sums of the softmax beside the result."""
    if backend.heads_first:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, N, L, D)
    out = function(q, k, v, **backend.keywords)
    out = out[0] if isinstance(out, tuple) else out
    return out.transpose(1, 2) if backend.heads_first else out


def _among_many_keys(function: AttentionFn, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`function`, but sdpa where keys are few: text and image gain no time in 8 bits and lose the most."""
    return function(q, k, v) if k.shape[1] > FEW_KEYS else sdpa(q, k, v)
