"""Feed-forward matrices made into the host's 8-bit formats while a file of 16 or 32 bits is loaded.

Only these: they are half of the products of a step, and on Wan attention in 8 bits made long clips fall
apart (vllm-omni, pull request 2920). A file that is quantised further is loaded as it is stored.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import comfy.quant_ops
import torch
from torch import Tensor

from ..wan.files.marks import MARK
from ..wan.refusal import Refusal
from .memory import frame_device

INT8 = "int8_convrot"
FP8_ROWS = "fp8_e4m3fn_rows"
EIGHT_BITS = {INT8: "int8_tensorwise", FP8_ROWS: "float8_e4m3fn"}  # weight_dtype -> the host's format
GROUPS = (256, 64, 16)  # columns that are rotated together, as the host has them; its fast kernels take 256
BYTES = (
    24  # a number while it is quantised: float32, rotated, scaled and rounded, and what is made on the way
)
_FEED_FORWARD = re.compile(r"blocks\.\d+\.ffn\.[02]\.weight")


def quantised(state_dict: Mapping[str, Tensor], weight_dtype: str) -> dict[str, Tensor]:
    """A DiT's state dict as a file in the host's format would hold it: feed-forward matrices, scales, marks.

    The host's own functions quantise, on its device, one matrix after the other.

    Args:
        state_dict: in 16 or 32 bits, under Wan's own names.
        weight_dtype: of `EIGHT_BITS`.

    Raises:
        Refusal: the weights have 8 bits already, or the host does not have the format.
    """
    keys = list(filter(_FEED_FORWARD.fullmatch, state_dict))
    if any(state_dict[key].dtype.itemsize == 1 for key in keys):
        raise Refusal(
            f"weight_dtype is {weight_dtype}, and the weights of this file have 8 bits: they would be "
            "rounded twice",
            "Set weight_dtype to default, or pick the bf16 or fp16 file",
        )
    out = dict(state_dict)
    for key in keys:
        device = frame_device(BYTES * state_dict[key].numel())
        parts, mark = _in_format(state_dict[key].to(device, torch.float32), weight_dtype)
        out |= {f"{key}{end}": part.cpu() for end, part in parts.items()}
        text = json.dumps({"format": EIGHT_BITS[weight_dtype]} | mark)
        out[key.removesuffix(".weight") + MARK] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return out


def _in_format(weight: Tensor, weight_dtype: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by the end of their key, what a mark says beside the format)."""
    group = next((size for size in GROUPS if weight.shape[1] % size == 0), None)
    options: dict[str, Any] = {"scale": "recalculate"}
    mark = {}
    if weight_dtype == INT8:
        options["per_channel"] = True
        mark = {} if group is None else {"convrot": True, "convrot_groupsize": group}
    quantise = _quantiser(weight_dtype)
    return quantise(weight, **options, **mark).state_dict(), mark


def _quantiser(weight_dtype: str) -> Callable[..., Any]:
    known = comfy.quant_ops.QUANT_ALGOS if comfy.quant_ops._CK_AVAILABLE else {}
    name = EIGHT_BITS[weight_dtype]
    if name not in known:
        raise Refusal(
            f"weight_dtype is {weight_dtype}, and this ComfyUI does not have its format {name}",
            "Update ComfyUI with its package comfy-kitchen, or set weight_dtype to default",
        )
    layout, quantised_tensor = known[name]["comfy_tensor_layout"], comfy.quant_ops.QuantizedTensor
    from_float: Any = quantised_tensor.from_float  # pyright: ignore[reportAttributeAccessIssue]
    return lambda weight, **options: from_float(weight, layout, **options)
