"""One safetensors file: its header is measured, and then the safetensors package opens it."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN, Checkpoint, is_safetensors, not_safetensors
from .limits import MAX_KEY_LENGTH, MAX_RANK, MAX_TENSORS, check_keys_length, load_json
from .marks import MARK, may_be_mark

# Of weights; in a look at the header alone, any other stands as whole numbers, which no weights are.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "U8": torch.uint8, "I8": torch.int8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # limit of the safetensors format itself


def read_safetensors(path: Path) -> Checkpoint:
    """A checkpoint with its tensors mapped from the file.

    Raises:
        Refusal: the file is something else, truncated or damaged.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return Checkpoint(state_dict, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise Refusal(f"a damaged safetensors file ({error})", AGAIN) from error


def check_safetensors(path: Path) -> None:
    """Refuses what `read_safetensors` would, and maps nothing for PyTorch.

    Raises:
        Refusal: as `read_safetensors`.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise Refusal(f"a damaged safetensors file ({error})", AGAIN) from error


def read_header(path: Path) -> Checkpoint:
    """A checkpoint by its header, as `wan.files.read_shapes` gives it.

    Raises:
        Refusal: as `read_safetensors`.
    """
    _check_header(path)
    try:
        with safe_open(path, framework="np") as file:  # for "pt" the whole file would be mapped
            state_dict = {k: _without_numbers(file.get_slice(k)) for k in file.keys()}  # noqa: SIM118
            marks = [k for k, value in state_dict.items() if k.endswith(MARK) and may_be_mark(value)]
            state_dict |= {k: torch.from_numpy(file.get_tensor(k)) for k in marks}
            return Checkpoint(state_dict, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise Refusal(f"a damaged safetensors file ({error})", AGAIN) from error


def _without_numbers(view: Any) -> Tensor:
    dtype = DTYPES.get(view.get_dtype(), torch.int64)
    return torch.empty(view.get_shape(), dtype=dtype, device="meta")


def _check_header(path: Path) -> None:
    """Refuses a file that is shorter than it says, before memory is taken for what it says.

    Types, shapes against places, gaps and overlaps are checked by safetensors when it opens the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
        if not is_safetensors(head):
            raise not_safetensors(head, size)
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise Refusal(
                f"damaged, or not a safetensors file: it states a header of {length} bytes, more than the "
                f"{MAX_HEADER_BYTES} that safetensors allows",
                AGAIN,
            )
        if length > size - 8:
            raise Refusal(f"truncated: it has {size} bytes, and its header alone takes {length + 8}", AGAIN)
        file.seek(8)
        raw = file.read(length)
    data_bytes = size - 8 - length
    entries = _entries(raw)
    try:
        needed = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        rank = max((len(entry["shape"]) for entry in entries.values()), default=0)
        sides = (n for entry in entries.values() for n in entry["shape"] if isinstance(n, int))
        side = max(sides, default=0)
        is_cut = needed > data_bytes
    except (AttributeError, TypeError, KeyError, IndexError) as error:
        raise Refusal("its header is damaged (no table of tensors)", AGAIN) from error
    if rank > MAX_RANK:  # safetensors itself has no bound
        raise Refusal(f"its header is damaged (a tensor of {rank} dimensions)", AGAIN)
    if side >= 2**63:  # beside a side of 0 safetensors takes it, and torch has no such number
        raise Refusal(f"its header is damaged (a side of {side})", AGAIN)
    if is_cut:
        raise Refusal(
            f"truncated: its tensors take {needed} bytes and only {data_bytes} are there "
            f"({data_bytes / needed:.0%})",
            AGAIN,
        )


def _entries(raw: bytes) -> dict[str, Any]:
    """The table of tensors in a header, of which safetensors bounds neither the number nor the keys."""
    count = raw.count(b'"data_offsets"')  # before millions are read; an escaped spelling is counted below
    if count > MAX_TENSORS:
        raise _too_many(count)
    try:
        pairs = load_json(raw, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise Refusal("its header is damaged (not JSON)", AGAIN) from error
    if not isinstance(pairs, _Pairs):
        raise Refusal("its header is damaged (no table of tensors)", AGAIN)
    entries = {key: dict(entry) if isinstance(entry, _Pairs) else entry for key, entry in pairs}
    if len(entries) < len(pairs):
        raise Refusal("its header is damaged (a tensor stands in it twice)", AGAIN)
    entries.pop("__metadata__", None)
    if len(entries) > MAX_TENSORS:
        raise _too_many(len(entries))
    longest = max(map(len, entries), default=0)
    if longest > MAX_KEY_LENGTH:
        raise Refusal(
            f"its header is damaged (a key of {longest} letters; up to {MAX_KEY_LENGTH} are read)", AGAIN
        )
    check_keys_length(entries)
    return entries


def _too_many(count: int) -> Refusal:
    return Refusal(f"it lists {count} tensors, and up to {MAX_TENSORS} are read", "Pick another file")


class _Pairs(list):
    """A JSON table as its pairs, of which two may have one key."""
