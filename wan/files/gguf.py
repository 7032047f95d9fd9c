"""GGUF: the tensors of a file, and their blocks back into numbers, in torch.

A row is cut into blocks of 32 or 256 numbers; a block holds a half-precision scale (and offset) and a few
bits per number. The layouts are those of ggml (ggml-quants.c), as the `gguf` package reads them; in float32
the numbers equal `gguf.quants.dequantize` bit for bit. Types that have no code here (IQ4_XS and the like) the
package itself unpacks, on the CPU; for these alone it must be installed.

N blocks.
"""

import math
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN, naming
from .gguf_container import Container
from .limits import MAX_RANK

# Type -> (numbers, bytes) of a block, of the types unpacked here.
BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}  # fmt: skip
_NUMBERS = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 30: "BF16",
}  # fmt: skip
NAMES = {"wan": "Wan2.1", "t5": "umT5"}  # of the families read here, by how `general.architecture` begins
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def packed_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a type.

    Raises:
        Refusal: neither we nor the package unpack the type, or rows of this length are no whole blocks.
    """
    block = BLOCKS.get(kind) or _block_of_package(kind)
    if block is None:
        raise Refusal(f"the GGUF type {kind} is not read here", f"Pick a file in one of {', '.join(BLOCKS)}")
    numbers, size = block
    if shape and shape[-1] % numbers:
        raise Refusal(
            f"rows of {shape[-1]} numbers are no whole blocks of {numbers} ({kind}): the file is damaged",
            AGAIN,
        )
    return math.prod(shape) // numbers * size


@cache
def _block_of_package(kind: str) -> tuple[int, int] | None:
    """(numbers, bytes) of a block of a type that the package unpacks; None if it does not, or is missing."""
    try:
        import gguf

        quant = gguf.GGMLQuantizationType[kind]
        numbers, size = gguf.GGML_QUANT_SIZES[quant]
        gguf.quants.dequantize(torch.zeros(1, size, dtype=torch.uint8).numpy(), quant)
    except (ImportError, KeyError, NotImplementedError):
        return None
    return numbers, size


def dequantize(data: Tensor, kind: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """One tensor, unpacked.

    Args:
        data: uint8, `packed_bytes(kind, shape)` of them in any shape, on the device to compute on: the CPU
            for a kind that is not in `BLOCKS`.
        kind: name of a type, as in `packed_bytes`.
        shape: of the result, rows last.
        dtype: of the result; the arithmetic is float32.
    """
    if kind in _PLAIN:
        return data.contiguous().view(_PLAIN[kind]).reshape(shape).to(dtype)
    if kind not in BLOCKS:
        import gguf

        numbers = gguf.quants.dequantize(data.reshape(1, -1).numpy(), gguf.GGMLQuantizationType[kind])
        return torch.from_numpy(numbers).reshape(shape).to(dtype)
    return _UNPACK[kind](data.reshape(-1, BLOCKS[kind][1])).reshape(shape).to(dtype)


def _cut(blocks, *sizes):
    """Columns of the blocks, of these sizes and the rest."""
    return blocks.split([*sizes, blocks.shape[1] - sum(sizes)], dim=1)


def _half(data):
    return data.contiguous().view(torch.float16).float()  # (N, 1)


def _signed(data):
    return data.contiguous().view(torch.int8).float()


def _fields(data, shifts, width, mask):
    """Bit fields: of each run of `width` bytes first all of one shift, then all of the next -> (N, count)."""
    runs = data.reshape(data.shape[0], -1, 1, width)
    # Shifts are Python ints: copying a tensor of them to the GPU would synchronise.
    return torch.cat([(runs >> shift) & mask for shift in shifts], dim=2).flatten(1)


def _q4_0(blocks):
    d, q = _cut(blocks, 2)
    return _half(d) * (_fields(q, (0, 4), 16, 15).float() - 8)


def _q4_1(blocks):
    d, m, q = _cut(blocks, 2, 2)
    return _half(d) * _fields(q, (0, 4), 16, 15).float() + _half(m)


def _five_bits(low, high):
    return (_fields(low, (0, 4), 16, 15) | (_fields(high, range(8), 1, 1) << 4)).float()


def _q5_0(blocks):
    d, high, low = _cut(blocks, 2, 4)
    return _half(d) * (_five_bits(low, high) - 16)


def _q5_1(blocks):
    d, m, high, low = _cut(blocks, 2, 2, 4)
    return _half(d) * _five_bits(low, high) + _half(m)


def _q8_0(blocks):
    d, q = _cut(blocks, 2)
    return _signed(q) * _half(d)


def _q2_k(blocks):
    scales, q, d, m = _cut(blocks, 16, 64, 2)
    scale = (_half(d) * (scales & 15).float())[..., None]  # (N, 16, 1)
    offset = (_half(m) * (scales >> 4).float())[..., None]
    return scale * _fields(q, (0, 2, 4, 6), 32, 3).unflatten(1, (16, 16)).float() - offset


def _q3_k(blocks):
    high, low, scales, d = _cut(blocks, 32, 64, 12)
    scale = _fields(scales[:, :8], (0, 4), 8, 15) | (_fields(scales[:, 8:], (0, 2, 4, 6), 4, 3) << 4)
    scale = (_half(d) * (scale.float() - 32))[..., None]  # (N, 16, 1)
    # A number is lowered by 4 where its high bit is not set.
    q = _fields(low, (0, 2, 4, 6), 32, 3).float() - 4 * (_fields(high, range(8), 32, 1) ^ 1).float()
    return scale * q.unflatten(1, (16, 16))


def _scales_of_8(packed):
    """Eight scales and eight offsets of 6 bits, packed into 12 bytes -> 2 x (N, 8)."""
    d, m, rest = packed.split(4, dim=1)
    scale = torch.cat([d & 63, (rest & 15) | ((d >> 2) & 48)], dim=1)
    offset = torch.cat([m & 63, (rest >> 4) | ((m >> 2) & 48)], dim=1)
    return scale.float(), offset.float()


def _q4_k(blocks):
    d, m, packed, q = _cut(blocks, 2, 2, 12)
    return _of_8(d, m, packed, _fields(q, (0, 4), 32, 15))


def _q5_k(blocks):
    d, m, packed, high, low = _cut(blocks, 2, 2, 12, 32)
    return _of_8(d, m, packed, _fields(low, (0, 4), 32, 15) | (_fields(high, range(8), 32, 1) << 4))


def _of_8(d, m, packed, q):
    scale, offset = _scales_of_8(packed)
    scale, offset = (_half(d) * scale)[..., None], (_half(m) * offset)[..., None]  # (N, 8, 1)
    return scale * q.unflatten(1, (8, 32)).float() - offset


def _q6_k(blocks):
    low, high, scales, d = _cut(blocks, 128, 64, 16)
    q = _fields(low, (0, 4), 64, 15) | (_fields(high, (0, 2, 4, 6), 32, 3) << 4)
    scale = (_half(d) * _signed(scales))[..., None]  # (N, 16, 1)
    return scale * (q.float() - 32).unflatten(1, (16, 16))


_UNPACK = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


class Packed(NamedTuple):
    """A tensor as it lies in the file.

    Attributes:
        data: uint8, one row of blocks per row of the tensor.
        kind: name of its type, as in `packed_bytes`.
        shape: of the unpacked tensor.
    """

    data: Tensor
    kind: str
    shape: tuple[int, ...]


# --- the tensors of a file -----------------------------------------------------------------------------


def read_gguf(path: str | Path, family: str = "wan") -> dict[str, Packed]:
    """Tensors by name of a GGUF file in the layout of city96's conversions, mapped from the file, not copied.

    Args:
        path: of the file.
        family: how its `general.architecture` begins, a key of `NAMES`.

    Raises:
        BadFile: the file is damaged, truncated, of another family or of unknown types.
    """
    path = Path(path)
    with naming(path.name):
        return packed_tensors(open_gguf(path, family))


def open_gguf(path: Path, family: str) -> Container:
    """The head of a GGUF file.

    Args:
        path, family: as of `read_gguf`.

    Raises:
        Refusal: as `read_gguf`, but for what is wrong with a tensor.
    """
    file = Container(path)
    _refuse_foreign(file, family)
    return file


def packed_tensors(file: Container) -> dict[str, Packed]:
    """All tensors of a file by name, mapped: pages are copied when written to.

    Raises:
        Refusal: one is truncated, damaged or of an unknown type.
    """
    if not file.tensors:
        raise Refusal("a GGUF file without any tensor, such as a vocabulary alone", "Pick a model file")
    places = _places(file)
    data = torch.from_file(str(file.path), shared=False, size=file.size, dtype=torch.uint8)
    packed = {
        name: Packed(data[begin:end].view(_rows(end - begin, shape), -1), kind, shape)
        for name, (begin, end, kind, shape) in places.items()
    }
    return _unfolded(packed)


def _rows(size: int, shape: tuple[int, ...]) -> int:
    """Rows of a tensor's bytes: its own, unless blocks lie across them."""
    return shape[0] if len(shape) > 1 and size % shape[0] == 0 else 1


def _refuse_foreign(file: Container, expected: str) -> None:
    """Refuses a part of a file, and a file of another family, unless its tensors are Wan's all the same."""
    parts = file.value("split.count")
    if isinstance(parts, int) and parts > 1:
        raise Refusal(
            f"one of the {parts} parts of a GGUF file, which are not read one by one",
            "Join them with llama.cpp's `gguf-split --merge`, or pick a file in one piece",
        )
    family = file.value("general.architecture") or ""
    family = family if isinstance(family, str) else repr(family)
    is_wan = any(".self_attn.q." in name or ".attn1.to_q." in name for name in file.tensors)
    if family and not (is_wan and expected == "wan") and not family.lower().startswith(expected):
        raise Refusal(
            f"a GGUF file of another family: its general.architecture is {family[:40]!r}",
            f"Pick a {NAMES[expected]} file, or load this one with a loader of its own family",
        )


def _unfolded(tensors: dict[str, Packed]) -> dict[str, Packed]:
    """The patch embedding with its five axes: GGUF holds four, and some tools fold it without a note."""
    for key, weight in tensors.items():
        bias = tensors.get(key.removesuffix("weight") + "bias")
        if key.endswith("patch_embedding.weight") and bias is not None and len(weight.shape) == 4:
            dim, (height, width) = bias.shape[0], weight.shape[2:]
            channels, rest = divmod(math.prod(weight.shape), dim * height * width)
            if not rest:
                return tensors | {key: weight._replace(shape=(dim, channels, 1, height, width))}
    return tensors


def _places(file: Container) -> dict[str, tuple[int, int, str, tuple[int, ...]]]:
    """(first byte, one past the last, type, shape) of each tensor, held against the file and each other."""
    places = {}
    for name, stored in file.tensors.items():
        shape = _shape(file, name, stored.shape)
        try:
            kind = _type_name(stored.kind)
            size = packed_bytes(kind, shape if shape == stored.shape else (math.prod(shape),))
        except Refusal as error:
            raise error.about(name) from error
        begin = file.data_start + stored.offset
        if stored.offset % file.alignment or begin + size > file.size:
            raise Refusal(
                f"truncated or damaged: {name} {list(shape)} takes {size} bytes at {begin} of {file.size}",
                AGAIN,
            )
        places[name] = begin, begin + size, kind, shape
    ordered = sorted(places.items(), key=lambda item: item[1][:2])
    for (earlier, (_, end, *_)), (later, (begin, *_)) in pairwise(ordered):
        if begin < end:
            raise Refusal(f"damaged: {earlier} and {later} overlap", AGAIN)
    return places


def _shape(file: Container, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor; that in the metadata is given for more axes than ggml's four."""
    given = file.value(f"comfy.gguf.orig_shape.{name}")
    given = shape if given is None else given
    sides = tuple(given) if isinstance(given, (list, tuple)) else ()
    if not sides or len(sides) > MAX_RANK or not all(type(n) is int and n > 0 for n in sides):
        raise Refusal(f"damaged: {name} has the shape {str(given)[:80]}", AGAIN)
    if math.prod(sides) != math.prod(shape):
        raise Refusal(
            f"damaged: {name} is {list(shape)}, and by its metadata {list(sides)}, which differ in size",
            AGAIN,
        )
    return sides


def _type_name(number: int) -> str:
    """Name of a type of ggml.

    Raises:
        Refusal: it is not unpacked here, and the package is missing or does not know it either.
    """
    if number in _NUMBERS:
        return _NUMBERS[number]
    try:
        import gguf

        return gguf.GGMLQuantizationType(number).name
    except ImportError as error:
        raise Refusal(
            f"the GGUF type of number {number} is unpacked by the gguf package, which is not installed",
            f"Run `{sys.executable} -m pip install gguf`, or pick a file in one of {', '.join(BLOCKS)}",
        ) from error
    except ValueError as error:
        raise Refusal(f"damaged: there is no GGUF type of number {number}", AGAIN) from error
