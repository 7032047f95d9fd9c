"""What a device can and cannot compute in."""

import torch


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
