"""The fastest exact attention on a CUDA device, tried at the true size of a run.

Each candidate computes one self-attention of as many tokens, heads and numbers a head as a pass has, on
random numbers. It must give what the first one gives, and be faster by `MARGIN` than those before it: two
that are as fast would else take turns between restarts, and as they round differently give another video.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .attention import SDPA, Attention, AttentionSize, has_cudnn, kernel_order, only_kernels
from .out_of_memory import is_out_of_memory

MARGIN = 1.15  # by which a candidate must be faster than those before it
TOLERANCE = 0.02  # of the relative difference of two kernels, which rounding explains
RANDOM_TOKENS = 509  # repeated to the length of a run; a prime, so that no kernel's tiles repeat with them
SECONDS = 0.1  # of calls to be timed in a turn, at least one and at most `CALLS`
CALLS = 10
TURNS = 2  # a GPU that was idle is slow at first: each candidate is timed early and late
COPIES = 7  # tensors of the size of q at the peak of a probe: q, k, v, three results, and what was repeated

T = TypeVar("T")
MakeRoom = Callable[[float], None]  # takes the bytes that a probe needs on the device

_found: dict[tuple, Attention] = {}


@dataclass(frozen=True)
class Candidate:
    """An attention to be tried, inside a context of its own.

    Attributes:
        said: its name in the report.
        tolerance: largest relative difference from the first candidate.
    """

    said: str
    attention: Attention
    within: Callable[[], AbstractContextManager] = nullcontext
    tolerance: float = TOLERANCE

    def call(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As an `AttentionFn`."""
        with self.within():
            return self.attention.function(q, k, v)


def fastest(
    device: torch.device,
    dtype: torch.dtype,
    size: AttentionSize,
    others: Sequence[Candidate] = (),
    make_room: MakeRoom | None = None,
) -> Attention:
    """The fastest of PyTorch's kernels and of others, found once a process for each device, dtype and size.

    Args:
        dtype: of q, k and v.
        others: tried after PyTorch's kernels.
        make_room: called before anything is tried.

    Returns:
        The attention with the seconds of each that agrees; `SDPA` where nothing could be tried.
    """
    if device.type != "cuda":
        return SDPA
    key = device, dtype, size, tuple(candidate.said for candidate in others)
    if key not in _found:
        if make_room is not None:
            make_room(probe_bytes(dtype, size))
        try:
            _found[key] = _race([*_of_pytorch(device), *others], _random(device, dtype, size), device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return SDPA  # nothing is known: there may be room for it in the next run
    return _found[key]


def probe_bytes(dtype: torch.dtype, size: AttentionSize) -> int:
    """What `fastest` takes on the device."""
    return COPIES * dtype.itemsize * size.tokens * size.heads * size.head_dim


def _of_pytorch(device: torch.device) -> list[Candidate]:
    return [
        Candidate(f"sdpa {name}", replace(SDPA, kernel=name), partial(only_kernels, name))
        for name in kernel_order(device)
        if name != "cuDNN" or (has_cudnn() and not torch.version.hip)
    ]


def _random(device: torch.device, dtype: torch.dtype, size: AttentionSize) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)  # of the CPU: the device's own numbers belong to the user's seed
    shape, times = (1, RANDOM_TOKENS, size.heads, size.head_dim), -(-size.tokens // RANDOM_TOKENS)
    few = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(3))
    return tuple(t.repeat(1, times, 1, 1)[:, : size.tokens] for t in few)


def _race(candidates: list[Candidate], qkv: tuple[Tensor, ...], device: torch.device) -> Attention:
    running: list[Candidate] = []
    expected = None
    for candidate in candidates:
        out = _unless_it_fails(partial(_called_quietly, candidate, qkv))
        if not isinstance(out, Tensor) or out.shape != qkv[0].shape:
            continue
        if expected is None and torch.isfinite(out).all():
            expected = out
        if expected is not None and _is_near(out, expected, candidate.tolerance):
            running.append(candidate)
        del out
    del expected
    if len(running) == 1:
        return running[0].attention
    took = [float("inf")] * len(running)
    for _ in range(TURNS):
        now = [_unless_it_fails(partial(_seconds, one, qkv, device)) for one in running]
        took = [float("inf") if s is None else min(least, s) for least, s in zip(took, now)]
    best, least = SDPA, float("inf")
    for candidate, seconds in zip(running, took):
        if MARGIN * seconds < least:
            best, least = candidate.attention, seconds
    timed = zip(running, took)
    return replace(best, seconds=tuple((one.said, s) for one, s in timed if math.isfinite(s)))


def _unless_it_fails(call: Callable[[], T]) -> T | None:
    """What a call gives; None where it raises, as another package's kernel may in any way.

    For lack of memory it raises on: nothing is known then.
    """
    try:
        return call()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return None


def _called_quietly(candidate: Candidate, qkv: tuple[Tensor, ...]) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says at length why a kernel is not there
        return candidate.call(*qkv)


def _is_near(out: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether the relative difference is small; False for NaN."""
    norm = torch.linalg.vector_norm
    return bool(norm(out - expected, dtype=torch.float32) <= tolerance * norm(expected, dtype=torch.float32))


def _seconds(candidate: Candidate, qkv: tuple[Tensor, ...], device: torch.device) -> float:
    """The least that one call took."""
    least, spent = float("inf"), 0.0
    for _ in range(CALLS):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        candidate.call(*qkv)
        torch.cuda.synchronize(device)
        took = time.perf_counter() - start
        least, spent = min(least, took), spent + took
        if spent > SECONDS:
            break
    return least
