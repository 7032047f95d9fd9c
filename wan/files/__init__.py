"""Reads checkpoint files, and says in a sentence what is wrong with one that cannot be read.

A file is looked at before it is opened: its first bytes tell a safetensors file from a Git LFS pointer,
a saved web page or a pickle, and every length in a safetensors header is checked against the size of the
file before memory is taken for it. Tensors are mapped from the file, not copied.

Renaming the layouts people have into Wan's own names is in `keys` (DiT, VAE) and `umt5`
(text encoder); the functions a loader needs are also importable from here.
"""

import json
import math
import pickle
import re
from itertools import islice
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .keys import is_quantization_key, refuse_loose_scales, to_wan_dit_keys, to_wan_vae_keys, wan_dit_key
from .kinds import Kind, detect_kind
from .umt5 import to_umt5_keys, umt5_config

__all__ = [
    "Checkpoint",
    "Kind",
    "check_head",
    "check_keys",
    "detect_kind",
    "is_quantization_key",
    "read_checkpoint",
    "refuse_loose_scales",
    "to_umt5_keys",
    "to_wan_dit_keys",
    "to_wan_vae_keys",
    "umt5_config",
    "wan_dit_key",
]

MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
MAX_INDEX_BYTES = 100_000_000
MAX_RANK = 64
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pth", ".pt")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
# Kinds the Wan2.1 release itself publishes as pickles (Wan2.1_VAE.pth, models_t5_umt5-xxl-enc-bf16.pth).
PICKLED_KINDS = ("wan21_vae", "umt5")
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


class Checkpoint(NamedTuple):
    """Tensors by name, and the text metadata of the file (empty where it has none)."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, str]


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one checkpoint file, or the whole set that a shard or its index belongs to.

    Tensors are on the CPU and mapped from the file: pages are read when first used, and writing to a
    tensor does not change the file.

    Args:
        path: a safetensors file; one shard `NAME-00001-of-0000N.safetensors` of a set or the set's
            `NAME.safetensors.index.json` (all shards are read, from the same folder); or one of the two
            pickles of the Wan2.1 release, `.pth` or `.pt`, which is read without running any code.

    Raises:
        ValueError: the file is missing, truncated, damaged or something else; says which, and the fix.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"There is no file {path.name!r}: it was moved, deleted or never fully downloaded.")
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path)
    shard = SHARD_NAME.fullmatch(path.name)
    if shard:
        return _read_shards(path.parent, _shard_names(path.name, shard))
    with path.open("rb") as file:
        head = file.read(1024)
    if path.suffix.lower() in PICKLE_SUFFIXES and not _is_safetensors(head):
        return _read_pickle(path, head)
    return _read_safetensors(path)


def check_head(head: bytes) -> None:
    """Refuse a download by its first bytes when it is something else than a safetensors file."""
    if not _is_safetensors(head) or int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
        raise ValueError(f"The file {_describe(head, len(head))}")


def check_keys(expected: dict[str, tuple[int, ...]], state_dict: dict[str, Tensor], name: str) -> None:
    """Compare a state dict with what a model needs.

    Bookkeeping keys of quantised checkpoints (`is_quantization_key`) are not compared.

    Args:
        expected: shape by key, as in `{k: tuple(v.shape) for k, v in model.state_dict().items()}`.
        state_dict: tensors in the model's own key names.
        name: what to call the file in the error, e.g. its file name.

    Raises:
        ValueError: one error with the missing, unexpected and wrongly shaped keys, ten of each.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(k for k in state_dict.keys() - expected.keys() if not is_quantization_key(k))
    reshaped = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(shape)}"
        for key, shape in sorted(expected.items())
        if key in state_dict and tuple(state_dict[key].shape) != tuple(shape)
    ]
    problems = [
        f"{len(keys)} {what}: {_list_names(keys)}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of the wrong shape", reshaped))
        if keys
    ]
    if problems:
        raise ValueError(
            f"The keys of {name} do not fit the model. " + "; ".join(problems) + ". "
            "The file is incomplete, or made for another model: download it again or pick another one."
        )


def _list_names(names, limit: int = 10) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


# --- sharded sets -------------------------------------------------------------------------------------


def _shard_names(name: str, shard: re.Match) -> list[str]:
    number, count = int(shard["number"]), int(shard["count"])
    if not 1 <= number <= count:
        raise ValueError(f"{name!r} calls itself shard {number} of {count}: the file was misnamed.")
    return [f"{shard['stem']}-{i:05d}-of-{shard['count']}.safetensors" for i in range(1, count + 1)]


def _read_index(path: Path) -> Checkpoint:
    """Read the shards that a `*.safetensors.index.json` lists in its `weight_map` (key -> file name)."""
    fault = f"{path.name!r} is not the index of a sharded checkpoint"
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{fault}: it is larger than {MAX_INDEX_BYTES} bytes.")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{fault}: it must be JSON with a `weight_map` of key to file name.") from error
    # Each entry must name a file of the index's own folder, read as either system would read it.
    outside = [n for n in names if not isinstance(n, str) or not _is_plain_name(n)]
    if outside or not names:
        listed = _list_names(map(repr, outside)) or "none"
        raise ValueError(
            f"{path.name!r} must list safetensors files of its own folder by bare name, without a path; "
            f"it lists {listed}. Do not use this file; download the set from its original source."
        )
    checkpoint = _read_shards(path.parent, names)
    absent = sorted(weight_map.keys() - checkpoint.state_dict.keys())
    if absent:
        raise ValueError(
            f"The shards of {path.name!r} lack {len(absent)} of the tensors it lists: "
            f"{_list_names(absent)}. Download the whole set again."
        )
    return checkpoint


def _is_plain_name(name: str) -> bool:
    is_bare = PurePosixPath(name).name == name == PureWindowsPath(name).name and "\0" not in name
    return is_bare and ".." not in name and name.endswith(".safetensors")


def _read_shards(folder: Path, names: list[str]) -> Checkpoint:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} shards are missing: {_list_names(missing)}. "
            "Put all files of the set into one folder, under their original names."
        )
    state_dict, metadata = {}, {}
    for name in names:
        shard = _read_safetensors(folder / name)
        twice = state_dict.keys() & shard.state_dict.keys()
        if twice:
            raise ValueError(
                f"{name!r} repeats tensors of an earlier shard: {_list_names(sorted(twice))}. "
                "The files come from different sets: download the whole set again."
            )
        state_dict.update(shard.state_dict)
        metadata = {**shard.metadata, **metadata}
    return Checkpoint(state_dict, metadata)


# --- one safetensors file -----------------------------------------------------------------------------


def _read_safetensors(path: Path) -> Checkpoint:
    _check_header(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            return Checkpoint(state_dict, dict(file.metadata() or {}))
    except SafetensorError as error:
        raise ValueError(
            f"{path.name!r} is a damaged safetensors file ({error}). Download it again."
        ) from error


def _is_safetensors(head: bytes) -> bool:
    """The format: 8 bytes of little-endian header length, then that many bytes of JSON, then the data."""
    return head[8:9] == b"{"


def _check_header(path: Path) -> None:
    """Check every length the header states against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(1024)
        if not _is_safetensors(head):
            raise ValueError(f"{path.name!r} {_describe(head, size)}")
        length = int.from_bytes(head[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path.name!r} states a header of {length} bytes, more than the {MAX_HEADER_BYTES} that "
                "safetensors allows: it is damaged, or not a safetensors file. Download it again."
            )
        if length > size - 8:
            raise ValueError(
                f"{path.name!r} is truncated: it has {size} bytes, and its header alone takes {length + 8}. "
                "Download it again."
            )
        file.seek(8)
        raw = file.read(length)
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name!r} has a damaged header (not JSON). Download it again.") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path.name!r} has a damaged header (no table). Download it again.")
    _check_offsets(header, size - 8 - length, path.name)


def _check_offsets(header: dict, data_bytes: int, name: str) -> None:
    """Check each tensor's shape against its place, and the last place against the bytes present."""
    end_of_data = 0
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        try:
            begin, end = entry["data_offsets"]
            shape, bits = entry["shape"], DTYPE_BITS.get(entry["dtype"])
            is_sane = 0 <= begin <= end and len(shape) <= MAX_RANK and all(side >= 0 for side in shape)
            is_sane = is_sane and (bits is None or math.prod(shape) * bits == 8 * (end - begin))
        except (TypeError, KeyError, ValueError):
            is_sane = False
        if not is_sane:
            raise ValueError(
                f"{name!r} has a damaged header: shape and place of {key!r} do not agree. Download it again."
            )
        end_of_data = max(end_of_data, end)
    if end_of_data > data_bytes:
        raise ValueError(
            f"{name!r} is truncated: its tensors take {end_of_data} bytes and only {data_bytes} are there "
            f"({data_bytes / end_of_data:.0%}). Download it again."
        )


def _describe(head: bytes, size: int) -> str:
    """What a file that is not safetensors looks like, and what to do about it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if size == 0:
        return "is empty (0 bytes): the download failed. Download it again."
    if text.startswith(b"version https://git-lfs"):
        stands_for = re.search(rb"\nsize (\d{1,20})", head)
        real = f" for a file of {int(stands_for[1])} bytes" if stands_for else ""
        return (
            f"is a Git LFS pointer ({size} bytes of text standing{real}), not the model. "
            "Run `git lfs pull` in its repository, or download the file itself."
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return (
            "is a web page, not a model: the link led to a page (often a log-in or licence page). "
            "Open the link in a browser, accept what it asks, and download the file itself."
        )
    if head.startswith(b"GGUF"):
        return (
            "is a GGUF file; only Wan21ModelLoader reads those, under .gguf names. Pick a safetensors file."
        )
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return (
            "is a PyTorch pickle (.pt, .pth, .ckpt or .bin), not safetensors. Pickles can run code, so "
            "it is not opened: pick a safetensors version. (Only the Wan2.1 release's own VAE and text "
            "encoder are read as pickles, under their .pth names.)"
        )
    if text.startswith((b"{", b"[")):
        return "is a JSON text (a configuration or an error message). Download the model file itself."
    if not any(head):
        return "starts with zeros only: an unfinished download. Download it again."
    return "is not a safetensors file: it is damaged or of another format. Download a safetensors version."


# --- the release's two pickles ------------------------------------------------------------------------


def _read_pickle(path: Path, head: bytes) -> Checkpoint:
    """Read a tensors-only pickle; `weights_only` refuses whatever would have to be run."""
    size = path.stat().st_size
    if head[:1] == b"\x80":
        raise ValueError(
            f"{path.name!r} is a pickle of PyTorch's old format, which cannot be mapped from the file. "
            "Pick a safetensors version."
        )
    if not head.startswith(b"PK\x03\x04"):
        raise ValueError(f"{path.name!r} {_describe(head, size)}")
    try:
        state_dict = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name!r} is a pickle that needs code to be run to open it, so it is refused. "
            "Pick a safetensors version."
        ) from error
    except Exception as error:  # torch reports damaged archives with many types
        raise ValueError(
            f"{path.name!r} is truncated or damaged ({_first_line(error)}). Download it again."
        ) from error
    is_flat = isinstance(state_dict, dict) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state_dict.items()
    )
    kind = detect_kind(state_dict) if is_flat else None
    if kind is None or kind.name not in PICKLED_KINDS:
        what = kind.what if kind else "something else"
        raise ValueError(
            f"{path.name!r} is {what} in a pickle. Only the Wan2.1 release's VAE and umT5 text encoder are "
            "read as pickles: pick a safetensors version."
        )
    return Checkpoint(dict(state_dict), {})


def _first_line(error: Exception) -> str:
    return "".join(islice(str(error).splitlines() or [type(error).__name__], 1))[:200]
