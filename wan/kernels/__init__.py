"""Kernels of `wan.glue`, `wan.fp8_rows` and the VAE, in Triton but for two, and where they are taken.

They are for NVIDIA GPUs and 16 bits, the VAE's for float32 too. Each is run on a few tokens
or pixels at its first use on a device and compared with PyTorch's own operations; where it differs, cannot be
built or cannot run, those stay for the process.
With WAN21_KERNELS=0 in the environment none is taken.
"""

import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..out_of_memory import is_out_of_memory

SWITCH = "WAN21_KERNELS"
CAPABILITY = (8, 0)  # least; bfloat16 needs it
LEAST: dict[str, tuple[int, int]] = dict.fromkeys(("quantise_rows", "row_product"), (8, 9))  # fp8
NEWEST = {"gelu_product": (9, 0)}  # on 12.0 product and GELU apart are faster (SGLang, pull request 34350)
WITHOUT_TRITON = {"gelu_product", "row_product"}
IN_FLOAT32 = {"norm_silu", "add_bias"}  # too: the VAE's encoder computes in it
MAX_WIDTH = 8192  # of a token that stays in the registers of one program
WIDEST = {"quantise_rows": 16384}  # of twice as many warps
TOLERANCE = 0.01  # of the relative difference; bfloat16 rounds by up to 0.004
TOLERANCE_IN_FLOAT32 = 1e-5

Distance = Callable[[Callable], float]


@dataclass(frozen=True)
class Choice:
    """Whether a kernel is taken.

    Attributes:
        function: the kernel, or None where PyTorch's own operations are taken.
        why: for these, as what follows a colon.
    """

    function: Callable[..., Any] | None
    why: str = ""


_building = Lock()  # one at a time: threads of several GPUs would build the same kernel
_chosen: dict[tuple, Choice] = {}


def choose(
    name: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], distance: Distance
) -> Choice:
    """A kernel or none, decided once a process for each device, dtype and size.

    Args:
        name: of the kernel and its module in this folder.
        dtype: to compute in.
        sizes: width of a token, then what else the kernel is built for.
        distance: of a kernel from PyTorch's own operations on this device, in this dtype and size: relative,
            the largest of all ways in which it is called; infinite for NaN.
    """
    key = name, device, dtype, sizes
    if key not in _chosen:
        with _building:
            if key not in _chosen:
                _chosen[key] = _decide(name, device, dtype, sizes[0], distance)
    return _chosen[key]


def describe(choices: Mapping[str, Choice]) -> str:
    """Which kernels are taken and why others are not, for the report."""
    taken = [name for name, choice in choices.items() if choice.function is not None]
    others: dict[str, list[str]] = {}
    for name, choice in choices.items():
        if choice.function is None:
            others.setdefault(choice.why, []).append(name)
    if not taken and len(others) == 1:
        return f"none of our own: {next(iter(others))}"
    return "; ".join(
        [", ".join(taken) or "none", *(f"not {', '.join(names)}: {why}" for why, names in others.items())]
    )


def relative(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm, infinite for NaN, which `max` would lose."""
    ours, expected = ours.float(), expected.float()
    off = float((ours - expected).norm() / expected.norm())
    return off if math.isfinite(off) else math.inf


def _decide(name: str, device: torch.device, dtype: torch.dtype, width: int, distance: Distance) -> Choice:
    if why := obstacle(name, device, dtype, width):
        return Choice(None, why)
    try:
        function = getattr(importlib.import_module(f".{name}", __name__), name)
        off = distance(function)
    except Exception as error:  # of the compilers: many kinds
        if is_out_of_memory(error):  # nothing is known of the kernel
            raise
        return Choice(None, f"cannot be built or run here ({_first_line(error)})")
    if off > (TOLERANCE if dtype.itemsize == 2 else TOLERANCE_IN_FLOAT32):
        return Choice(None, f"differs from PyTorch's own by {off:.1e} on this device")
    return Choice(function)


def obstacle(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why a kernel is not tried, or None."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH} is 0"
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return "they are for NVIDIA GPUs"
    if dtype.itemsize != 2 and not (name in IN_FLOAT32 and dtype == torch.float32):
        return f"they work in 16 bits and the model in {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    least, newest = LEAST.get(name, CAPABILITY), NEWEST.get(name, capability)
    if capability < least:
        return f"they need compute capability {_version(least)} and the device has {_version(capability)}"
    if capability > newest:
        return (
            f"of use up to compute capability {_version(newest)}, and the device has {_version(capability)}"
        )
    if name in WITHOUT_TRITON:
        return None
    if width > (widest := WIDEST.get(name, MAX_WIDTH)):
        return f"they take a width of up to {widest} and the model has {width}"
    return _without_triton()


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@cache
def _without_triton() -> str | None:
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError:
        return "Triton is not installed"
    except Exception as error:  # built for another PyTorch or Python
        return f"Triton does not load ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
