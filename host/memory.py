"""The memory of the device: what may be used, the plans for it, and room when it has run out."""

from contextlib import contextmanager

import comfy.model_management
import psutil
import torch
from comfy.memory_management import extra_ram_release
from comfy.model_prefetch import cleanup_prefetched_modules

from ..wan.memory import GIB, choose_plans, step_bytes
from ..wan.out_of_memory import is_out_of_memory
from ..wan.preflight import fail
from .lora import changes_weights_at_use
from .model import kept_dtype

LORA_COPIES = 4  # of a matrix that a LoRA changes at its use: itself, a copy, the difference, that scaled
LEAST_ROOM = GIB  # of weights taken off the device at a time


def usable_bytes(device):
    """What models and activations may take of a device: all that is free, or that the host would free."""
    management = comfy.model_management
    # The entry of a MODEL that is gone stays in the list until the host next loads one.
    loaded = (m for m in management.current_loaded_models if m.device == device and m.model is not None)
    held = 0 if device.type == "cpu" else sum(m.model_loaded_memory() for m in loaded)
    return management.get_free_memory(device) + held - management.extra_reserved_memory()


def plan_memory(model, latent_shape, plans, passes, attention, teacache):
    """Which of the plans to begin with.

    Args:
        model: a MODEL of ours.
        plans: as from `wan.memory.plans_from`.
        attention: name of the backend, or None for the host's.
        teacache: whether it is on.

    Returns:
        (plans left, bytes of a step, one sentence for the report)
    """
    more = {"teacache": teacache} | ({} if attention is None else {"attention": attention})
    if changes_weights_at_use(model):
        itemsize = model.model.get_dtype_inference().itemsize
        more["matrix_bytes"] = max(model.model.matrix_bytes(itemsize), LORA_COPIES * itemsize)
    load = model.model.load(tuple(latent_shape), passes, **more)
    on_cpu = model.load_device.type == "cpu"
    weights = weight_bytes(model)
    budget = usable_bytes(model.load_device)
    needs = [step_bytes(load, plan) for plan in plans]
    plans = choose_plans(plans, needs, 0 if on_cpu else weights, budget)
    need = step_bytes(load, plans[0])
    where = "" if on_cpu else (", resident" if need + weights <= budget else ", streamed in part")
    said = f"{plans[0]}; {need / GIB:.2f} GiB estimated beside {weights / GIB:.2f} GiB of weights{where}"
    return plans, need, said


def need_host_bytes(node, need, what, fix):
    """Have the host give back memory that it only keeps for later, and refuse what does not fit even then.

    Where nobody refuses, Linux ends the whole server with the queue when memory and swap are full.

    Args:
        need: bytes.
        what: the beginning of the sentence, such as "81 frames of 832x480".
    """
    management = comfy.model_management
    extra_ram_release(need)  # outputs of earlier graphs
    management.ensure_pin_budget(need)  # copies of weights that models not at work have left
    free = _free_host_bytes()
    if need > free:
        fail(node, f"{what} take {need / 1e9:.1f} GB of host memory, and {free / 1e9:.1f} GB are free", fix)


def _free_host_bytes():
    try:
        swap = psutil.swap_memory().free
    except (RuntimeError, OSError):  # psutil cannot read it everywhere
        swap = 0
    return psutil.virtual_memory().available + swap


def weight_bytes(patcher):
    """Of a MODEL's weights on the device. Where the host loads them at their use, it counts the file's."""
    if not patcher.is_dynamic():
        return patcher.model_size()
    total = 0
    for layer in patcher.model.modules():
        for name, value in layer.named_parameters(recurse=False):
            numbers = getattr(value, "_qdata", value).numel()
            total += numbers * kept_dtype(layer, name).itemsize
    return total


def raise_unless_out_of_memory(error):
    """Raise it again, unless it is one of the ways in which a device says that its memory has run out."""
    if not (comfy.model_management.is_oom(error) or is_out_of_memory(error)):
        raise error


@contextmanager
def tell_out_of_memory():
    """Whatever the device raises when its memory has run out, as `torch.OutOfMemoryError`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise_unless_out_of_memory(error)
        raise torch.OutOfMemoryError(str(error)) from None


def make_room(patcher):
    """Empty the caches, take other models off the device, then a part of this one's weights.

    Returns:
        Whether anything was taken off.
    """
    management = comfy.model_management
    ours = [m for m in management.current_loaded_models if m.model is patcher or patcher.is_clone(m.model)]
    gone = bool(management.free_memory(1e30, patcher.load_device, keep_loaded=ours))
    if patcher.is_dynamic():  # a layer that ran out of memory would take its half-loaded weights for whole
        cleanup_prefetched_modules(patcher.model.modules())
    resident = patcher.loaded_size()
    amount = max(LEAST_ROOM, resident // 4)
    if patcher.is_dynamic():  # for more than its pages hold, the host drops what is merged in small weights
        amount = min(amount, resident - patcher.model.model_loaded_weight_memory)
    if not gone and patcher.load_device.type != "cpu" and resident and amount:
        gone = patcher.partially_unload(patcher.offload_device, amount) > 0
    management.soft_empty_cache()
    return gone
