"""The two pickles of the Wan2.1 release: what a file lists is looked at before torch's reader is asked.

`weights_only` runs no code of a file. It still makes what the file asks for and hashes what that names: some
hundred bytes keep a process busy for years, or end it (tuples in tuples as a key). Of what it would do, only
what `torch.save` writes for tensors by name is let through.
"""

import io
import pickle
import pickletools
import re
import struct
import zipfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN, Checkpoint, not_safetensors
from .kinds import detect_kind

# Kinds the Wan2.1 release itself publishes so (Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth).
PICKLED_KINDS = ("wan21_vae", "umt5")
MAX_PICKLE_BYTES = 1_000_000  # that of the release's umT5 has 30,000; the numbers lie outside
MAX_DIRECTORY_BYTES = 20_000_000  # of the zip archive
MAX_VALUES = 1000  # in a tuple and the tuples in it; what makes a tensor has some 20
_CALLED = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor_v2|parameter)|torch \w+Storage")
_OPCODES = {
    "PROTO", "STOP", "MARK", "NONE", "NEWFALSE", "NEWTRUE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET",
    "LONG_BINGET", "GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip


def read_pickle(path: Path, head: bytes) -> Checkpoint:
    """Reads a tensors-only pickle; its tensors are mapped from the file.

    Args:
        head: its first bytes.

    Raises:
        Refusal: it is something else, damaged, or holds more than tensors by name.
    """
    if head[:1] == b"\x80":
        raise Refusal(
            "a pickle of PyTorch's old format, which cannot be mapped from the file",
            "Pick a safetensors version",
        )
    if not head.startswith(b"PK\x03\x04"):
        raise not_safetensors(head, path.stat().st_size)
    _check_opcodes(_pickle_of(path))
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise _more_than_tensors("a class of its own") from error
    except Exception as error:  # torch reports damaged archives with many types
        raise _damaged(error) from error
    _check_tensors(state_dict)
    return Checkpoint(dict(state_dict), {})


def _check_tensors(state_dict: Any) -> None:
    is_flat = isinstance(state_dict, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    )
    kind = detect_kind(state_dict) if is_flat else None
    for key, value in state_dict.items() if is_flat else ():
        if value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise Refusal(f"{key} has fewer numbers than its shape {list(value.shape)}", AGAIN)
    if kind is None or kind.name not in PICKLED_KINDS:
        what = kind.what if kind else "something else"
        raise Refusal(
            f"{what} in a pickle; only the Wan2.1 release's VAE and umT5 text encoder are read as pickles",
            "Pick a safetensors version",
        )


class _Bounded(io.FileIO):
    """A file of which no large part is read at a time, as a zip archive's directory is."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"its directory has {size} bytes")
        return super().read(size)


def _pickle_of(path: Path) -> bytes:
    """The pickle in an archive of `torch.save`, as torch finds it there.

    Raises:
        Refusal: it is packed (a little of that may stand for a lot), large or missing.
    """
    try:
        with _Bounded(path) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                is_pickle = entry.filename.lower().endswith(".pkl")
                if is_pickle and (entry.compress_type or entry.file_size > MAX_PICKLE_BYTES):
                    raise zipfile.BadZipFile(f"its pickle is packed or has over {MAX_PICKLE_BYTES} bytes")
        return torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise _damaged(error) from error


def _check_opcodes(raw: bytes) -> None:
    """Walks through a pickle as its reader would, with the size of each value in place of it.

    Raises:
        Refusal: it does what `torch.save` does not for tensors by name, or tuples grow.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[object, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            name = opcode.name
            called = str(argument) if name == "GLOBAL" else ""
            if name not in _OPCODES or (called and not _CALLED.fullmatch(called)):
                raise _more_than_tensors(called or name)
            if name == "MARK":
                marks.append(len(stack))
            elif name.endswith("PUT"):
                memo[argument] = stack[-1]
            elif name.endswith("GET"):
                stack.append(memo[argument])
            else:
                values = 1 + sum(_taken(opcode, stack, marks)) * name.startswith("TUPLE")
                if values > MAX_VALUES:
                    raise Refusal(f"damaged: a tuple in it holds more than {MAX_VALUES} values", AGAIN)
                stack += [values] * len(opcode.stack_after)
    except Refusal:
        raise
    except (ValueError, LookupError, struct.error) as error:
        raise _damaged(error) from error


def _taken(opcode: pickletools.OpcodeInfo, stack: list[int], marks: list[int]) -> list[int]:
    """What an opcode takes off the stack."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:  # what lies above the mark, and what is named before that
        start = marks.pop() - before.index(pickletools.markobject)
    if start < 0:
        raise IndexError("a pickle that takes more than it has")
    taken = stack[start:]
    del stack[start:]
    return taken


def _more_than_tensors(what: str) -> Refusal:
    return Refusal(
        f"a pickle that holds more than plain tensors by name ({what[:80]}), for which code may have to be "
        "run, so it is refused",
        "Pick a safetensors version",
    )


def _damaged(error: Exception) -> Refusal:
    line = "".join(islice(str(error).splitlines() or [type(error).__name__], 1))[:200]
    return Refusal(f"truncated or damaged ({line})", AGAIN)
