"""Streamed weights of a block brought to the device once for all that a step does with it.

The host's queue fetches the layers of a whole block on another stream, while the block before computes; they
stay until the block is through. Without it each layer fetches its own at every call: once a pass and part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import LowVramPatch, ModelPatcher
from torch import Tensor, nn

from .room import usable_bytes
from .stored import kept_dtype, weight_bytes

try:
    from comfy import model_prefetch
except ImportError:  # a host without the queue
    model_prefetch = None

AHEAD = "prefetch_dynamic_vbars"  # key in transformer_options, as the host sets it for its own models
BUFFERS = 2  # of a block: one computes and the next is fetched
_PARAMETERS = ("weight", "bias")


class _OnACopy(LowVramPatch):
    """The host's patch of a layer, which it works into the fetched numbers in place: by a second call of the
    layer they would get it twice."""

    def __call__(self, weight: Tensor) -> Tensor:
        return super().__call__(weight.clone())


@contextmanager
def fetched_ahead(
    blocks: Sequence[nn.Module], device: torch.device, transformer_options: dict
) -> Iterator[Callable[[], None]]:
    """Context of one walk over blocks; it gives what is to be called before each of them, in their order.

    It lets go of all that is fetched, also when the walk is cut short.
    """
    queue: Any = None
    if model_prefetch is not None and blocks and transformer_options.get(AHEAD):
        groups = [nn.ModuleList(layers_of(block)) for block in blocks]
        queue = model_prefetch.make_prefetch_queue(groups, device, transformer_options)
    if model_prefetch is None or queue is None:
        yield lambda: None
        return
    pop = model_prefetch.prefetch_queue_pop
    layers = [layer for group in groups for layer in group]
    _keep_patches_apart(layers)
    try:
        yield lambda: pop(queue, device, None)
        pop(queue, device, None)
    finally:
        model_prefetch.cleanup_prefetched_modules(layers)
        others = [one for one in model_prefetch.PREFETCH_QUEUES if one is not queue]
        model_prefetch.PREFETCH_QUEUES[:] = others


def forget_fetched(model: nn.Module) -> None:
    """Lets go of what was fetched ahead. After a fetch that was cut short a layer would take it for all."""
    if model_prefetch is not None:
        model_prefetch.cleanup_prefetched_modules(model.modules())


def layers_of(block: nn.Module) -> list[nn.Module]:
    """The layers whose weights the host's dynamic memory brings, less those with a patch of unknown ways."""
    return [
        layer
        for layer in block.modules()
        if hasattr(layer, "_v")
        and all(patch is None or type(patch) in (LowVramPatch, _OnACopy) for patch in _patches(layer))
    ]


def ahead_bytes(patcher: ModelPatcher) -> int:
    """What blocks fetched ahead take on the device, at most; 0 where a MODEL's weights never come so."""
    management, device = comfy.model_management, patcher.load_device
    if (
        model_prefetch is None
        or not patcher.is_dynamic()
        or management.NUM_STREAMS == 0
        or device.type == "cpu"
        or not management.device_supports_non_blocking(device)
    ):
        return 0
    return BUFFERS * max((_block_bytes(block) for block in patcher.model.diffusion_model.blocks), default=0)


def ahead_beside(patcher: ModelPatcher, step: float) -> int:
    """`ahead_bytes` where weights are streamed; 0 where all of them stay on the device beside a step.

    Args:
        step: its bytes.
    """
    ahead = ahead_bytes(patcher)
    if ahead and step + weight_bytes(patcher) <= usable_bytes(patcher.load_device):
        return 0
    return ahead


def _block_bytes(block: nn.Module) -> int:
    total = 0
    for layer in block.modules():
        for name in _PARAMETERS:
            value = getattr(layer, name, None)
            if isinstance(value, Tensor):
                kept = getattr(value, "_qdata", value).numel() * kept_dtype(layer, name).itemsize
                total += max(kept, value.nbytes)  # a file's own dtype is what is fetched
        total += sum(patch.memory_required() for patch in _patches(layer) if patch is not None)
    return total


def _keep_patches_apart(layers: Sequence[nn.Module]) -> None:
    """The object stays the host's, which keeps its pinned memory by it."""
    for layer in layers:
        for patch in _patches(layer):
            if patch is not None:
                patch.__class__ = _OnACopy


def _patches(layer: nn.Module) -> list[Any]:
    return [getattr(layer, f"{name}_lowvram_function", None) for name in _PARAMETERS]
