"""The memory of the device: what may be used, the plans for it, and room when it has run out."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import comfy.model_management
import psutil
import torch
from comfy import memory_management
from comfy.memory_management import extra_ram_release
from comfy.model_patcher import ModelPatcher

from ..wan.memory import GIB, MemoryPlan, choose_plans, step_bytes
from ..wan.option import Option
from ..wan.out_of_memory import OutOfMemoryError, is_out_of_memory
from ..wan.refusal import Refusal
from .devices import devices_of
from .lora import changes_weights_at_use, factor_bytes
from .prefetch import ahead_bytes, forget_fetched
from .room import usable_bytes
from .stored import weight_bytes

LORA_COPIES = 4  # of a matrix changed at its use: the weight, its clone, the difference, that scaled
LEAST_ROOM = GIB  # at least so many bytes of weights are taken off the device at a time


def plan_memory(
    model: ModelPatcher,
    latent_shape: tuple[int, ...],
    plans: Sequence[MemoryPlan],
    passes: int,
    options: Iterable[Option] = (),
) -> tuple[Sequence[MemoryPlan], int, str]:
    """Which of the plans to begin with.

    Args:
        model: a MODEL of ours.
        latent_shape: [B, 16, T, h, w].
        plans: as from `wan.memory.plans_from`.
        passes: of a step on each device of the MODEL.
        options: of the job; some hold memory.

    Returns:
        The plans left for all its devices, bytes of a step, and one sentence for the report.
    """
    if model.model.diffusion_model.elsewhere is not None:
        return plans, 0, f"{plans[0]}; weights and steps are in the workers"
    size = model.model.step_size(tuple(latent_shape), passes)
    for option in options:
        size = option.sized(size)
    if changes_weights_at_use(model):
        itemsize = model.model.get_dtype_inference().itemsize
        size = replace(size, matrix_bytes=max(model.model.matrix_bytes(itemsize), LORA_COPIES * itemsize))
    size = replace(size, lora_bytes=factor_bytes(model))
    weights = weight_bytes(model)
    ahead = ahead_bytes(model)
    if ahead:
        plans = (*plans, replace(plans[-1], ahead=False))
    needs = [step_bytes(size, plan) for plan in plans]
    budgets = {device: usable_bytes(device) for device in devices_of(model)}
    plans = min(
        (
            choose_plans(plans, needs, 0 if device.type == "cpu" else weights, budget, ahead)
            for device, budget in budgets.items()
        ),
        key=len,
    )
    need = step_bytes(size, plans[0])
    if plans[0].ahead and need + weights > min(budgets.values()):
        need += ahead
    where = ""
    for device, budget in budgets.items():
        if device.type != "cpu":
            where += ", resident" if need + weights <= budget else ", streamed in part"
            where += f" on {device}" if len(budgets) > 1 else ""
    said = f"{plans[0]}; {need / GIB:.2f} GiB estimated beside {weights / GIB:.2f} GiB of weights{where}"
    return plans, need, said


def frame_device(need: float) -> torch.device:
    """The device for work outside a MODEL, with room made on it for so many bytes."""
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(need, device)
    return device


def need_host_bytes(need: float, what: str, fix: str) -> None:
    """Makes room in host memory out of the host's caches, and refuses what does not fit even then.

    Otherwise Linux would kill the server, and the queue with it, when memory and swap are full.

    Args:
        need: bytes.
        what: the beginning of the sentence, such as "81 frames of 832x480".
        fix: what to do, as of a `Refusal`.

    Raises:
        Refusal: there is less.
    """
    management = comfy.model_management
    extra_ram_release(need)  # cached outputs of earlier graphs
    management.ensure_pin_budget(need)  # pinned copies of weights of idle models
    free = _free_host_bytes()
    if need > free:
        raise Refusal(
            f"{what} take {need / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free", fix
        )


def _free_host_bytes() -> int:
    """Memory and swap that programs may still take."""
    try:
        swap = psutil.swap_memory().free
    except (RuntimeError, OSError):  # psutil cannot read swap on every system
        swap = 0
    return psutil.virtual_memory().available + swap


def raise_unless_out_of_memory(error: Exception) -> None:
    """Raises the error again, unless a device reports by it that it is out of memory."""
    if not (comfy.model_management.is_oom(error) or is_out_of_memory(error)):
        raise error


@contextmanager
def tell_out_of_memory() -> Iterator[None]:
    """Turns every error by which a device reports that it is out of memory into an `OutOfMemoryError`."""
    try:
        yield
    except OutOfMemoryError:
        raise
    except Exception as error:
        raise_unless_out_of_memory(error)
        raise OutOfMemoryError(str(error)) from None


def make_room(patcher: ModelPatcher) -> bool:
    """Empties the caches, takes other models off the device, then a part of this one's weights.

    Returns:
        Whether anything was taken off.
    """
    management = comfy.model_management
    ours = [m for m in management.current_loaded_models if m.model is patcher or patcher.is_clone(m.model)]
    gone = bool(management.free_memory(1e30, patcher.load_device, keep_loaded=ours))
    if patcher.is_dynamic():
        forget_fetched(patcher.model)
    resident = patcher.loaded_size()
    amount = max(LEAST_ROOM, resident // 4)
    if patcher.is_dynamic():
        # Asked for more than its pages, the dynamic patcher also restores patched weights
        # (`restore_loaded_backups`).
        amount = min(amount, resident - patcher.model.model_loaded_weight_memory)
    if not gone and patcher.load_device.type != "cpu" and resident and amount:
        gone = patcher.partially_unload(patcher.offload_device, amount) > 0
    management.soft_empty_cache()
    return gone


class MemoryWatch:
    """Context in which the memory of a MODEL's devices is watched; `said` is a sentence on it afterwards."""

    def __init__(self, model: ModelPatcher):
        self.devices = devices_of(model)
        self.said = ""

    def __enter__(self) -> "MemoryWatch":
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
        return self

    def __exit__(self, *error) -> None:
        peaks = [
            f"{torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB on {device}"
            for device in self.devices
            if device.type == "cuda"
        ]
        if peaks:
            without = " without the weights, which the host holds" if memory_management.aimdo_enabled else ""
            self.said = f"peak {' and '.join(peaks)}{without}"
        else:
            held = psutil.Process().memory_info().rss / GIB
            self.said = f"{held:.2f} GiB held by the process ({self.devices[0]})"
