"""Whether an error means that a device had no memory to give."""

import torch

# What PyTorch says on the CPU, and what cuDNN and cuBLAS say when there is no room for their workspace.
WORDS = ("out of memory", "defaultcpuallocator", "unable to find an engine", "status_alloc_failed")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, had no memory to give."""
    said = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in WORDS)
    )
