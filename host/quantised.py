"""The host's quantised formats in a checkpoint: marked as its layers read them, refused where it has none."""

import json
from typing import Any

import comfy.model_management
import comfy.quant_ops
import comfy.utils
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wan.device import multiplies_in_int8
from ..wan.files.bad_file import AGAIN
from ..wan.files.marks import MARK, mark_of, marks_in
from ..wan.refusal import Refusal
from .progress import tell

INT8_FORMAT = "int8_tensorwise"
OLD_MARK = "scaled_fp8"  # key of one marker for all layers of a part


def with_formats(
    state_dict: dict[str, Tensor], metadata: dict[str, str]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and metadata of a file, every quantised layer marked with its format.

    The host takes all weights with scales for e4m3 and would convert those in e5m2, whose range is wider.

    Raises:
        Refusal: a mark is damaged.
    """
    marks_in(metadata)
    if key := next((k for k, v in state_dict.items() if k.endswith(".scale_input") and v.numel() != 1), None):
        raise Refusal(f"{key} holds {state_dict[key].numel()} numbers and must be one", AGAIN)
    # A whole-pipeline checkpoint has one old marker for each of its parts.
    for prefix in [key.removesuffix(OLD_MARK) for key in state_dict if key.endswith(OLD_MARK)] or [""]:
        state_dict, metadata = comfy.utils.convert_old_quants(state_dict, prefix, metadata=metadata)
    for layer in [key.removesuffix(MARK) for key in state_dict if key.endswith(MARK)]:
        weight = state_dict.get(f"{layer}.weight")
        if weight is not None and weight.dtype == torch.float8_e5m2:
            config = mark_of(layer, state_dict[layer + MARK]) | {"format": "float8_e5m2"}
            state_dict[layer + MARK] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    return state_dict, metadata


def quantised_layers(state_dict: dict[str, Tensor]) -> dict[str, str]:
    """Format by layer of what is stored in the host's quantised formats.

    Raises:
        Refusal: the host does not have one of them, or a mark is damaged.
    """
    formats = {
        layer: str(mark_of(layer, state_dict[layer + MARK]).get("format"))
        for layer in (key.removesuffix(MARK) for key in state_dict if key.endswith(MARK))
    }
    known = comfy.quant_ops.QUANT_ALGOS if comfy.quant_ops._CK_AVAILABLE else {}
    unknown = sorted(set(formats.values()) - known.keys())
    if unknown:
        raise Refusal(
            f"weights are stored as {', '.join(unknown)}, and this ComfyUI reads "
            f"{', '.join(known) or 'no such format'}",
            "Update ComfyUI with its package comfy-kitchen, or pick another file",
        )
    return formats


def unpacked_formats(formats: set[str], device: torch.device) -> set[str]:
    """Those whose weights are unpacked before each product on this device, which cannot multiply in them.

    The host does so with all but int8, which fails at its first product there (on Apple's GPUs).
    """
    management = comfy.model_management
    multiplies = {"nvfp4": management.supports_nvfp4_compute, "mxfp8": management.supports_mxfp8_compute}
    multiplies |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), management.supports_fp8_compute)
    multiplies[INT8_FORMAT] = multiplies_in_int8
    return {name for name in formats & multiplies.keys() if not multiplies[name](device)}


def tell_unpacked(formats: set[str], device: torch.device) -> None:
    """Says which formats are unpacked before each multiplication on this device."""
    if unpacked := sorted(unpacked_formats(formats, device)):
        name = comfy.model_management.get_torch_device_name(device)
        tell(f"{name} cannot multiply in {', '.join(unpacked)}: weights are unpacked at each use")


def multiply_exactly(layers: nn.Module, formats: set[str] | None = None) -> None:
    """Makes quantised layers unpack their weights and multiply these, where the host would round the input.

    Of the DiT those outside the blocks, which read float32: rounded to fp8 that is off by 2 %. They run once
    a pass, so nothing is lost in speed.

    Args:
        formats: which; None is all.
    """
    layer: Any
    for layer in layers.modules():
        chosen = formats is None or getattr(layer, "quant_format", None) in formats
        if chosen and hasattr(layer, "_full_precision_mm"):
            layer._full_precision_mm = True
            layer._forward = _unpacked_linear  # int8 weights multiply in int8 as they are, whatever that says


def _unpacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    exact: Any = weight.dequantize() if isinstance(weight, comfy.quant_ops.QuantizedTensor) else weight
    return F.linear(x, exact, bias)
