"""State dicts of toy models, as files hold them."""

import json
import math

import torch
from transformers import UMT5Config, UMT5EncoderModel

UMT5_SIZE = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 3, "num_heads": 2}
DTYPE_NAMES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.uint8: "U8", torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def meta_state_dict(build):
    """Keys and shapes of a model, without its memory."""
    with torch.device("meta"):
        return build().state_dict()


def with_prefix(prefix, state_dict):
    return {prefix + key: tensor for key, tensor in state_dict.items()}


def umt5_state_dict(**changes):
    return meta_state_dict(lambda: UMT5EncoderModel(UMT5Config(**UMT5_SIZE | changes)))


def write_sparse(path, state_dict, metadata=None, numbers=()):
    """A safetensors file of these shapes and types: a true header, and a hole where the numbers would be.

    Args:
        numbers: bytes by key, of those that are not to be zero.
    """
    header, end = {"__metadata__": metadata or {}}, 0
    for key, value in state_dict.items():
        begin, end = end, end + math.prod(value.shape) * value.dtype.itemsize
        header[key] = {
            "dtype": DTYPE_NAMES[value.dtype],
            "shape": list(value.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)
        for key, data in dict(numbers).items():
            file.seek(8 + len(raw) + header[key]["data_offsets"][0])
            file.write(data)
    return path
