"""Products in fp16 that are also summed in fp16: twice the speed on GeForce cards, and a sum may overflow."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

import comfy.model_management
import torch
from torch import Tensor

from ..wan.refusal import Refusal

FP16_FAST = "fp16_fast"
IN_FP16_SUMS = "products are summed in fp16, which may overflow; weight_dtype fp16 or bf16 is the safe way"
OVERFLOWED = Refusal(
    "a step gave NaN or infinite numbers, and weight_dtype is fp16_fast, whose sums in fp16 overflow on some "
    "models",
    "Set weight_dtype to fp16, which sums in float32, or to bf16",
)
_lock = Lock()
_inside, _before = 0, False


def check_fp16_sums(device: torch.device) -> None:
    """Refuses a device, or a PyTorch, that does not have them.

    Raises:
        Refusal: says which.
    """
    matmul, management = torch.backends.cuda.matmul, comfy.model_management
    name = management.get_torch_device_name(device)
    if device.type != "cuda" or not management.is_nvidia():
        why = f"{name} has no sums in fp16 (that takes an NVIDIA GPU)"
    elif not hasattr(matmul, "allow_fp16_accumulation"):
        why = f"PyTorch {torch.__version__} has no sums in fp16 (2.7 is the first with them)"
    elif not management.should_use_fp16(device, prioritize_performance=False):
        why = f"{name} does not compute in fp16"
    else:
        return
    raise Refusal(f"weight_dtype is {FP16_FAST}, and {why}", "Set weight_dtype to fp16 or bf16")


@contextmanager
def fp16_sums(on: bool) -> Iterator[None]:
    """Inside, products in fp16 are summed in fp16.

    The switch is the process's: of threads on several GPUs the first sets it for all, and the last takes it
    back.
    """
    global _inside, _before
    if not on:
        yield
        return
    matmul = torch.backends.cuda.matmul
    with _lock:
        if not _inside:
            _before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                matmul.allow_fp16_accumulation = _before


def refuse_overflow(velocity: Tensor) -> None:
    """Refuses what sums in fp16 have spoilt.

    Raises:
        Refusal: there are NaN or infinite numbers.
    """
    if not torch.isfinite(velocity).all():
        raise OVERFLOWED
