"""The container of GGUF checkpoints, by the optional `gguf` package; `wan/gguf.py` unpacks the blocks."""

import math
import warnings
from pathlib import Path

import torch

from ..wan.gguf import Packed, packed_bytes

MAX_TENSORS = 100_000


def read_gguf(path: str | Path) -> dict[str, Packed]:
    """Read a GGUF file in the layout of city96's conversions; data is mapped from the file, not copied.

    Raises:
        ValueError: the `gguf` package is missing, or the file is damaged, truncated or of unknown types.
    """
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            "GGUF files are read with the gguf package, which is not installed. Run pip install gguf in "
            "ComfyUI's Python, or pick a safetensors file"
        ) from error
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(24)
    count = int.from_bytes(head[8:16], "little")
    if len(head) < 24 or head[:4] != b"GGUF" or count > MAX_TENSORS:
        raise ValueError(f"{path.name!r} is not a GGUF file, or its head is damaged. Download it again")
    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the package reports damage with many types
        raise ValueError(f"{path.name!r} is a damaged GGUF file ({error}). Download it again") from error
    return {tensor.name: _packed(reader, tensor, size, path.name) for tensor in reader.tensors}


def _packed(reader, tensor, size, name):
    kind = tensor.tensor_type.name
    stored = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")  # what has more than ggml's four axes
    if stored is None:
        shape = tuple(int(side) for side in reversed(tensor.shape))
    else:
        shape = tuple(int(stored.parts[i][0]) for i in stored.data)
    try:
        needed = packed_bytes(kind, (math.prod(shape),) if stored is not None else shape)
    except ValueError as error:
        raise ValueError(f"{name!r}: {tensor.name}: {error}") from error
    if needed != tensor.n_bytes or tensor.data_offset + needed > size:
        raise ValueError(
            f"{name!r} is truncated or damaged: {tensor.name} {list(shape)} takes {needed} bytes at "
            f"{tensor.data_offset} of {size}. Download it again"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map is read-only, and nothing here writes to it
        data = torch.from_numpy(tensor.data.reshape(-1).view("uint8"))
    rows = shape[0] if len(shape) > 1 else 1
    return Packed(data.view(rows, -1), kind, shape)
