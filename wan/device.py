"""What a device can and cannot compute in."""

import torch


def is_wide(device: torch.device) -> bool:
    """Whether a device has float64 and complex numbers.

    The CPU and what calls itself CUDA (AMD's too) have them; Apple's, Intel's, DirectML's and some NPUs lack
    one or both, and so does Iluvatar's, whose PyTorch calls it CUDA as well and has a `corex` of its own.
    """
    return device.type == "cpu" or (device.type == "cuda" and not hasattr(torch, "corex"))
