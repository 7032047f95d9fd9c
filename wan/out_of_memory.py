"""Whether an error means that a device had no memory to give."""

import torch

# PyTorch before 2.5, as torch-directml needs it, has the class under the older name only.
OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)

# What PyTorch says on the CPU; what cuDNN, cuBLAS and MIOpen say when there is no room for their workspace;
# what DirectML and Intel's Level Zero say in a plain RuntimeError.
WORDS = (
    "out of memory", "defaultcpuallocator", "unable to find an engine", "status_alloc_failed",
    "statusallocfailed", "enough gpu video memory", "out_of_device_memory", "out_of_host_memory",
    "out_of_resources",
)  # fmt: skip


class OutOfMemoryOn(OutOfMemoryError):  # pyright: ignore[reportGeneralTypeIssues] (it is a class)
    """One of the devices that work on a step had too little.

    Attributes:
        device: its name.
    """

    def __init__(self, device: str, said: str):
        super().__init__(f"{device}: {said}")
        self.device = device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch, on any device, had no memory to give."""
    said = str(error).lower()
    return isinstance(error, (OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in said for words in WORDS)
    )
