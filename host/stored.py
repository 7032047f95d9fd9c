"""What a parameter is on the device (dtype, shape, bytes), where the tensor in its place says otherwise.

The host keeps quantised weights in a `QuantizedTensor`; a GGUF layer holds the file's blocks and says so in
`packed`; with the host's dynamic memory a parameter has the file's dtype until its layer is called.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch import nn

from ..wan.files.gguf import dequantize
from ..wan.refusal import Refusal

GGUF_UNPACKING_BYTES = 13  # measured peak bytes per weight of dequantize, 16-bit result included
PATCHED = "comfy_patched_weights"  # the host's mark of a layer whose weight has its patches
UNPACKING_BYTES = 8  # of the host's formats but fp8: two copies in float32, one after the other


_PACKED = Refusal(
    "the MODEL's weights are packed as in its GGUF file, and saved they would be bytes that nothing reads",
    "Save from a safetensors file of the model",
)


class PackedPatcher(ModelPatcher):
    """A MODEL whose matrices are packed as in a GGUF file."""

    def model_state_dict_for_saving(self, model: nn.Module | None = None, prefix: str = "") -> dict:
        """What the host's ModelSave and CheckpointSave would write.

        Raises:
            Refusal: always; packed bytes are nothing that a loader reads.
        """
        raise _PACKED

    def model_state_dict(self, filter_prefix: str | None = None) -> dict:
        """The host's.

        Raises:
            Refusal: the values are asked for, as the host's LoraSave does with a prefix, and are packed. The
                others read the keys only. After a ModelSubtract all have patches and are unpacked.
        """
        state_dict = super().model_state_dict(filter_prefix)
        if filter_prefix is not None and any(v.dtype == torch.uint8 for v in state_dict.values()):
            raise _PACKED
        return state_dict


def store_as(layer: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Makes a parameter, which holds no numbers yet, one of `dtype`."""
    setattr(layer, f"{name}_comfy_model_dtype", dtype)  # read by the host's dynamic memory
    value = getattr(layer, name)
    if value is not None:
        setattr(layer, name, nn.Parameter(torch.empty_like(value, dtype=dtype), requires_grad=False))


def kept_dtype(layer: nn.Module, name: str) -> torch.dtype:
    """The dtype in which a parameter is kept on the device; uint8 where it is packed."""
    value = getattr(layer, name)
    if isinstance(value, QuantizedTensor):
        return value._qdata.dtype
    if name == "weight" and getattr(layer, "packed", None):
        return value.dtype
    return getattr(layer, f"{name}_comfy_model_dtype", None) or value.dtype


def kept_shape(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of the numbers that a parameter stands for."""
    packed = getattr(layer, "packed", None) if name == "weight" else None
    return packed[1] if packed else tuple(getattr(layer, name).shape)


def kept_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """`kept_shape` of all parameters, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: kept_shape(layer, name)
        for prefix, layer in model.named_modules()
        for name, _ in layer.named_parameters(recurse=False)
    }


def spoilt_weight(model: nn.Module) -> str | None:
    """Name of the first weight of NaN or infinite numbers; None if there is none.

    All are read, one after the other: for a run that has failed.
    """
    for prefix, layer in model.named_modules():
        for name, value in layer.named_parameters(recurse=False):
            numbers = value.detach()
            packed = getattr(layer, "packed", None) if name == "weight" else None
            if packed:
                numbers = dequantize(numbers, *packed)
            elif isinstance(numbers, QuantizedTensor):
                numbers = numbers.dequantize()
            if numbers.dtype.itemsize == 1:  # torch asks no fp8
                numbers = numbers.float()
            if not numbers.is_meta and not torch.isfinite(numbers).all():
                return f"{prefix}.{name}" if prefix else name
    return None


def matrix_bytes(layer: nn.Module | None, itemsize: int) -> int:
    """Bytes for each number of a layer's matrix while it is in use, beside those of its place on the device.

    Args:
        itemsize: bytes of a number in the compute dtype.
    """
    if getattr(layer, "packed", None):
        return GGUF_UNPACKING_BYTES
    weight = getattr(layer, "weight", None)
    if isinstance(weight, QuantizedTensor) and getattr(layer, "_full_precision_mm", False):
        return 2 * itemsize if weight._qdata.dtype.is_floating_point else UNPACKING_BYTES
    return itemsize


def weight_bytes(patcher: ModelPatcher) -> int:
    """Bytes of a MODEL's weights on the device. With dynamic memory the host's own count is of the file."""
    if not patcher.is_dynamic():
        return patcher.model_size()
    total = 0
    for layer in patcher.model.modules():
        for name, value in layer.named_parameters(recurse=False):
            numbers = getattr(value, "_qdata", value).numel()
            total += numbers * kept_dtype(layer, name).itemsize
    return total


@contextmanager
def integers_as_they_are(model: nn.Module) -> Iterator[list[str]]:
    """Context in which the host saves weights as they are whose numbers are integers; gives their keys.

    Of weights that are not on the device it makes parameters that require gradients, which integers cannot.
    Those on the device, patches and all, it takes as they are by itself.
    """
    named = model.named_modules()
    layers = {f"{name}.weight": layer for name, layer in named if _in_integers(layer)}
    layers = {key: layer for key, layer in layers.items() if not getattr(layer, PATCHED, False)}
    for layer in layers.values():
        setattr(layer, PATCHED, True)
    try:
        yield [*layers]
    finally:
        for layer in layers.values():
            setattr(layer, PATCHED, False)


def _in_integers(layer: nn.Module) -> bool:
    weight: Any = getattr(layer, "weight", None)
    return isinstance(weight, QuantizedTensor) and not weight._qdata.dtype.is_floating_point
