"""umT5 from GGUF: llama.cpp's key names, and the tokenizer that its metadata holds.

The tokenizer is a SentencePiece model, written here in protobuf's wire format (sentencepiece_model.proto) so
that the protobuf package is not needed.
"""

import re
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN, naming
from .gguf import dequantize, open_gguf, packed_tensors
from .gguf_container import Container
from .umt5 import LAST_NORM, TOKENIZER_KEY

_MODULES = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
UNIGRAM, BYTE = 1, 6  # kinds of a model and of a piece


def read_umt5_gguf(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """A umT5 encoder under Hugging Face's names, unpacked into `dtype`; its tokenizer, where it holds one.

    Raises:
        BadFile: as `read_gguf`.
    """
    with naming(path.name):
        file = open_gguf(path, "t5")
        state_dict = {}
        for name, packed in packed_tensors(file).items():
            is_norm = packed.kind == "F32" and len(packed.shape) == 1  # small, and stays exact
            state_dict[_key(name)] = dequantize(*packed, torch.float32 if is_norm else dtype)
        if tokenizer := _tokenizer(file):
            state_dict[TOKENIZER_KEY] = torch.frombuffer(bytearray(tokenizer), dtype=torch.uint8)
    return state_dict


def umt5_gguf_shapes(path: Path) -> dict[str, Tensor]:
    """What `read_umt5_gguf` gives, without data: nothing is unpacked.

    Raises:
        BadFile: as `read_gguf`.
    """
    with naming(path.name):
        file = open_gguf(path, "t5")
        found = {_key(name): packed.shape for name, packed in packed_tensors(file).items()}
        if tokenizer := _tokenizer(file):
            found[TOKENIZER_KEY] = (len(tokenizer),)
    return {key: torch.empty(shape, device="meta") for key, shape in found.items()}


def _key(name: str) -> str:
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)\.weight", name)
    if block and block[2] in _MODULES:
        return f"encoder.block.{block[1]}.{_MODULES[block[2]]}.weight"
    return {"token_embd.weight": "shared.weight", "enc.output_norm.weight": LAST_NORM}.get(name, name)


def _tokenizer(file: Container) -> bytes:
    """The SentencePiece model that the metadata describes; empty where it holds none.

    Raises:
        Refusal: what the metadata says of it does not fit together.
    """
    try:
        return _sentencepiece_model(file)
    except (ValueError, TypeError, AttributeError, ArithmeticError, struct.error) as error:
        # Values of any type, size and length may stand there.
        raise Refusal(f"the tokenizer in its metadata is damaged ({error})", AGAIN) from error


def _sentencepiece_model(file: Container) -> bytes:
    def value(key: str, default: Any = None) -> Any:
        found = file.value(f"tokenizer.ggml.{key}")
        return default if found is None else found

    if value("model") != "t5" or value("tokens") is None:
        return b""
    tokens, kinds = value("tokens"), value("token_type")
    model = b"".join(
        _message(1, _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
        for text, score, kind in zip(tokens, value("scores"), kinds, strict=True)
    )
    ids = {"unknown_token_id": 40, "bos_token_id": 41, "eos_token_id": 42, "padding_token_id": 43}
    trainer = _number(3, UNIGRAM) + _number(4, len(tokens)) + _number(35, int(BYTE in kinds))  # byte_fallback
    trainer += b"".join(_number(at, value(key, -1)) for key, at in ids.items())
    flags = {key: value(key) for key in ("add_space_prefix", "remove_extra_whitespaces")}
    at = {"add_space_prefix": 3, "remove_extra_whitespaces": 4}
    normalizer = b"".join(_number(at[key], int(flag)) for key, flag in flags.items() if flag is not None)
    charsmap = value("precompiled_charsmap")
    if charsmap is not None:  # signed in some files; of a number alone, bytes() would make that many zeros
        normalizer += _message(2, bytes(n & 255 for n in charsmap))
    return model + _message(2, trainer) + _message(3, normalizer)


def _varint(number: int) -> bytes:
    number &= (1 << 64) - 1  # protobuf's form of negative numbers
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _number(field: int, number: int) -> bytes:
    return _varint(field << 3) + _varint(number)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content
