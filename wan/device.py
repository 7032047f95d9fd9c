"""What a device can and cannot compute in."""

from functools import cache
from typing import Any

import torch

from .out_of_memory import is_out_of_memory

SIDE = 32  # of a matrix that is multiplied to see whether a device does it


def is_wide(device: torch.device) -> bool:
    """Whether a device has float64 and complex numbers.

    The CPU and what calls itself CUDA (AMD's too) have them; Apple's, Intel's, DirectML's and some NPUs lack
    one or both, and so does Iluvatar's, whose PyTorch calls it CUDA as well and has a `corex` of its own.
    """
    return device.type == "cpu" or (device.type == "cuda" and not hasattr(torch, "corex"))


def multiplies_in_bf16(device: torch.device | str) -> bool:
    """Whether a device has bfloat16 matrix products in hardware: about twice as fast as float32 ones.

    Of CPUs those with AVX-512 BF16 (Zen 4, Cooper Lake and later) or AMX (Sapphire Rapids and later).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if torch.device(device).type == "cpu":
        # Both asked of PyTorch's cpuinfo; without a public name.
        has = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
        return torch.backends.mkldnn.is_available() and any(ask() for ask in has if ask)
    return False


@cache
def multiplies_in_int8(device: torch.device) -> bool:
    """Whether PyTorch multiplies matrices of int8 on a device; tried once.

    Apple's GPUs and DirectML have none, NVIDIA's from compute capability 7.5 on.
    """
    public: Any = torch
    ones = torch.ones(SIDE, SIDE, dtype=torch.int8, device=device)
    try:
        multiply = getattr(public, "int8_mm", None) or public._int_mm  # one of both, by version
        return int(multiply(ones, ones)[0, 0]) == SIDE
    except Exception as error:  # each backend has its own way to say so
        if is_out_of_memory(error):  # nothing is known of the device
            raise
        return False
