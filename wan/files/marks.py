"""Marks of quantised layers: the format of each, as JSON in the bytes of a tensor or in the metadata."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN
from .keys import TWO_A_BYTE
from .limits import json_table

MARK = ".comfy_quant"
IN_METADATA = "_quantization_metadata"
MAX_MARK_BYTES = 10_000
BLOCK = {"mxfp8": 32, "nvfp4": 16}  # columns with one scale
GROUPS = tuple(4**n for n in range(1, 7))  # columns that may be rotated together


def may_be_mark(value: Tensor) -> bool:
    """Whether a tensor may hold the text of a mark, by its type and size."""
    return value.dtype in (torch.uint8, torch.int8) and value.ndim == 1 and value.numel() <= MAX_MARK_BYTES


def mark_of(layer: str, value: Tensor) -> dict[str, Any]:
    """What the mark of a layer says.

    Raises:
        Refusal: it is no JSON table.
    """
    if not may_be_mark(value):
        raise Refusal(f"{layer}{MARK} must be a text in bytes", AGAIN)
    mark = json_table(value.numpy().tobytes(), f"{layer}{MARK}")
    _check_group(mark, layer)
    return mark


def _check_group(mark: Mapping[str, Any], layer: str) -> None:
    """Refuses columns that are rotated together of a number that there is no rotation for."""
    rotation = _rotation(mark)
    size = rotation.get("convrot_groupsize", 256)
    if not _is_rotated(rotation, mark.get("format")):
        return  # nobody reads it
    if type(size) not in (int, float) or size not in GROUPS:
        raise Refusal(
            f"{layer} has the convrot_groupsize {str(size)[:40]}; {', '.join(map(str, GROUPS))} are read",
            AGAIN,
        )


def _rotation(mark: Mapping[str, Any]) -> dict[str, Any]:
    """A mark with what its `params` say, which older files have."""
    params = mark.get("params")
    return {**(params if isinstance(params, dict) else {}), **mark}


def _is_rotated(rotation: Mapping[str, Any], name: str | None) -> bool:
    """Whether a layer of the format `name` holds columns that were rotated, by what `_rotation` gave."""
    return name == "convrot_w4a4" or bool(rotation.get("convrot"))


def marks_in(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Marks by layer that stand in a file's metadata.

    Raises:
        Refusal: they are no JSON table of tables.
    """
    what = f"`{IN_METADATA}` in its metadata"
    layers = json_table(metadata.get(IN_METADATA, '{"layers": {}}'), what).get("layers")
    if not isinstance(layers, dict) or not all(isinstance(mark, dict) for mark in layers.values()):
        raise Refusal(f"{what} must be a JSON table with `layers`, a table for each", AGAIN)
    for layer, mark in layers.items():
        _check_group(mark, layer)
    return layers


def check_scales(state_dict: Mapping[str, Tensor], formats: Mapping[str, str]) -> None:
    """Refuses marked layers that cannot be unpacked.

    Args:
        formats: by layer.

    Raises:
        Refusal: a layer that is there lacks its scale, or is no matrix of single bytes, or its scales or
            rotation do not go with its size.
    """
    for layer in formats:
        weight = state_dict.get(f"{layer}.weight")
        if weight is None:
            continue  # of another part of the file; of this one, it is missing as any weight may be
        scales = {f"{layer}.weight_scale", f"{layer}.scale_weight"} & state_dict.keys()
        if not scales or (formats[layer] == "nvfp4" and f"{layer}.weight_scale_2" not in state_dict):
            raise Refusal(f"{layer} is stored as {formats[layer]} and lacks a scale", AGAIN)
        if weight.ndim != 2:
            raise Refusal(f"{layer}.weight is quantised and has {weight.ndim} axes instead of 2", AGAIN)
        _check_sizes(layer, formats[layer], state_dict)


def _check_sizes(layer: str, name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuses scales and rotations that do not go with the size of their matrix."""
    scale, (rows, columns) = state_dict.get(f"{layer}.weight_scale"), state_dict[f"{layer}.weight"].shape
    columns *= 2 if name in TWO_A_BYTE else 1
    if scale is not None and name == "int8_tensorwise" and scale.numel() not in (1, rows):
        raise Refusal(
            f"{layer} has {scale.numel()} scales for {rows} rows; one for all or one for each is read", AGAIN
        )
    if scale is not None and name in BLOCK:
        # cuBLAS' order of block scales: tiles of 128 rows and 4 blocks, filled up.
        expected = 128 * math.ceil(rows / 128) * 4 * math.ceil(columns / BLOCK[name] / 4)
        if scale.numel() != expected:
            raise Refusal(
                f"{layer} has {scale.numel()} block scales; its {rows} x {columns} take {expected}", AGAIN
            )
    rotation = _rotation(mark_of(layer, state_dict[layer + MARK]) if layer + MARK in state_dict else {})
    size = rotation.get("convrot_groupsize", 256)
    if _is_rotated(rotation, name) and columns % size:
        raise Refusal(f"{layer} has {columns} columns, which are no whole groups of {size}", AGAIN)


def unpacked_shapes(state_dict: Mapping[str, Tensor], formats: Mapping[str, str]) -> dict[str, Tensor]:
    """A file's tensors, those that hold two numbers in a byte replaced by what they stand for, without data.

    Args:
        formats: format by layer, of the host's quantised layers; checked (`check_scales`).
    """
    packed = [f"{layer}.weight" for layer, name in formats.items() if name in TWO_A_BYTE]
    shapes = {key: state_dict[key].shape for key in packed if key in state_dict}
    return dict(state_dict) | {
        key: torch.empty(rows, 2 * columns, device="meta") for key, (rows, columns) in shapes.items()
    }
