"""Reads checkpoint files, and says in a sentence what is wrong with one that cannot be read.

A file is looked at before it is opened: its first bytes tell a safetensors file from a Git LFS pointer,
a saved web page or a pickle, and what its header states is compared with the size of the file before memory
is taken for it. Tensors are mapped from the file, not copied.

Renaming the layouts people have into Wan's own names is in `keys` (DiT, VAE) and `umt5`
(text encoder); the functions a loader needs are also importable from here.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from torch import Tensor

from ..refusal import Refusal
from .bad_file import (
    AGAIN,
    BadFile,
    Checkpoint,
    check_is_file,
    is_safetensors,
    listed,
    naming,
    not_safetensors,
)
from .keys import (
    is_quantization_key,
    is_readable,
    refuse_loose_scales,
    to_wan_dit_keys,
    to_wan_vae_keys,
    vae_dim,
    wan_dit_key,
)
from .kinds import Kind, WrongKind, detect_kind
from .limits import load_json
from .pickled import read_pickle
from .safetensors_file import MAX_HEADER_BYTES, read_header, read_safetensors
from .umt5 import to_umt5_keys, umt5_config, umt5_shapes

__all__ = [
    "BadFile",
    "Checkpoint",
    "Kind",
    "WrongKind",
    "check_head",
    "check_keys",
    "detect_kind",
    "is_quantization_key",
    "read_checkpoint",
    "read_shapes",
    "refuse_loose_scales",
    "to_umt5_keys",
    "to_wan_dit_keys",
    "to_wan_vae_keys",
    "umt5_config",
    "umt5_shapes",
    "vae_dim",
    "wan_dit_key",
]

MAX_INDEX_BYTES = 100_000_000
INDEX_SUFFIX = ".safetensors.index.json"
PICKLE_SUFFIXES = (".pth", ".pt")
SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


ReadOne = Callable[[Path], Checkpoint]  # reads one safetensors file


def read_checkpoint(
    path: str | Path, name: str | None = None, read_one: ReadOne = read_safetensors
) -> Checkpoint:
    """One checkpoint file, or the whole set that a shard or its index belongs to.

    Tensors are on the CPU and mapped from the file: pages are read when first used, and writing to a
    tensor does not change the file.

    Args:
        path: a safetensors file; one shard `NAME-00001-of-0000N.safetensors` of a set or the set's
            `NAME.safetensors.index.json` (all shards are read, from the same folder); or one of the two
            pickles of the Wan2.1 release, `.pth` or `.pt`, which is read without running any code.
        name: what to call the file in a refusal; its file name by default.
        read_one: reads a safetensors file, or each shard of a set.

    Raises:
        BadFile: the file is missing, truncated, damaged or something else; says which, and the fix.
    """
    path = Path(path)
    with naming(name or path.name):
        return _read(path, read_one)


def read_shapes(path: str | Path) -> Checkpoint:
    """A checkpoint as `read_checkpoint` gives it, by the header alone: tensors without numbers.

    The marks of quantised layers (`comfy_quant`), a few bytes each, have theirs. The file is not mapped, so
    that it may be larger than the memory. Types in which no weights are stand as int64.

    Raises:
        BadFile: as `read_checkpoint`.
    """
    path = Path(path)
    with naming(path.name):
        return _read(path, read_header)


def _read(path: Path, read_one: ReadOne) -> Checkpoint:
    check_is_file(path)
    if path.name.endswith(INDEX_SUFFIX):
        return _read_index(path, read_one)
    shard = SHARD_NAME.fullmatch(path.name)
    if shard:
        return _read_shards(path.parent, _shard_names(path.name, shard), read_one)
    with path.open("rb") as file:
        head = file.read(1024)
    if path.suffix.lower() in PICKLE_SUFFIXES and not is_safetensors(head):
        return read_pickle(path, head)
    return read_one(path)


def check_head(head: bytes) -> None:
    """Refuses a download by its first bytes.

    Raises:
        Refusal: it is something else than a safetensors file; without a name.
    """
    if not is_safetensors(head) or int.from_bytes(head[:8], "little") > MAX_HEADER_BYTES:
        raise not_safetensors(head, len(head))


def check_keys(
    expected: Mapping[str, tuple[int, ...]], state_dict: Mapping[str, Tensor], name: str = "this file"
) -> list[str]:
    """Compares a state dict with what a model needs.

    Bookkeeping keys of quantised checkpoints (`is_quantization_key`) are not compared.

    Args:
        expected: shape by key, as in `{k: tuple(v.shape) for k, v in model.state_dict().items()}`.
        state_dict: tensors in the model's own key names.
        name: what to call the file in the refusal.

    Returns:
        Keys that the model does not have, where that is all: it can be loaded without them.

    Raises:
        Refusal: keys are missing, wrongly shaped or no real numbers; names ten of each, and of those that are
            unexpected.
    """
    missing = sorted(expected.keys() - state_dict.keys())
    unexpected = sorted(k for k in state_dict.keys() - expected.keys() if not is_quantization_key(k))
    reshaped = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(shape)}"
        for key, shape in sorted(expected.items())
        if key in state_dict and tuple(state_dict[key].shape) != tuple(shape)
    ]
    odd = [
        f"{key} {str(state_dict[key].dtype).removeprefix('torch.')}"
        for key in sorted(expected.keys() & state_dict.keys())
        if not is_readable(key, state_dict)
    ]
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "of the wrong shape": reshaped,
        "of a type in which no weights are": odd,
    }
    problems = [f"{len(keys)} {what}: {listed(keys)}" for what, keys in found.items() if keys]
    if missing or reshaped or odd:
        raise Refusal(
            f"the keys of {name} do not fit the model. " + "; ".join(problems),
            "It is incomplete, or made for another model: download it again or pick another one",
        )
    return unexpected


# --- sharded sets -------------------------------------------------------------------------------------


def _shard_names(name: str, shard: re.Match) -> list[str]:
    number, count = int(shard["number"]), int(shard["count"])
    if not 1 <= number <= count:
        raise Refusal(f"it calls itself shard {number} of {count}", "Give it back the name it had")
    return [f"{shard['stem']}-{i:05d}-of-{shard['count']}.safetensors" for i in range(1, count + 1)]


def _read_index(path: Path, read_one: ReadOne) -> Checkpoint:
    """Reads the shards that a `*.safetensors.index.json` lists in its `weight_map` (key -> file name)."""
    fault = "not the index of a sharded checkpoint"
    if path.stat().st_size > MAX_INDEX_BYTES:
        raise Refusal(f"{fault}: it is larger than {MAX_INDEX_BYTES} bytes", AGAIN)
    try:
        weight_map = load_json(path.read_bytes())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refusal(f"{fault}: it must be JSON with a `weight_map` of key to file name", AGAIN) from error
    # Each entry must name a file of the index's own folder, read as either system would read it.
    outside = [n for n in names if not isinstance(n, str) or not _is_plain_name(n)]
    if outside or not names:
        raise Refusal(
            "an index must list safetensors files of its own folder by bare name, without a path; "
            f"it lists {listed(map(repr, outside)) or 'none'}",
            "Do not use this file; download the set from its original source",
        )
    checkpoint = _read_shards(path.parent, names, read_one)
    absent = sorted(weight_map.keys() - checkpoint.state_dict.keys())
    if absent:
        raise Refusal(
            f"its shards lack {len(absent)} of the tensors it lists: {listed(absent)}",
            "Download the whole set again",
        )
    return checkpoint


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name longer than the system allows
        return False


def _is_plain_name(name: str) -> bool:
    is_bare = PurePosixPath(name).name == name == PureWindowsPath(name).name and "\0" not in name
    return is_bare and ".." not in name and name.endswith(".safetensors")


def _read_shards(folder: Path, names: list[str], read_one: ReadOne) -> Checkpoint:
    missing = [name[:100] for name in names if not _is_there(folder / name)]
    if missing:
        raise Refusal(
            f"{len(missing)} of the {len(names)} shards are missing: {listed(missing)}",
            "Put all files of the set into one folder, under their original names",
        )
    state_dict, metadata = {}, {}
    for name in names:
        with naming(name):
            shard = read_one(folder / name)
        twice = state_dict.keys() & shard.state_dict.keys()
        if twice:
            raise Refusal(
                f"{name!r} repeats tensors of an earlier shard: {listed(sorted(twice))}",
                "The files come from different sets: download the whole set again",
            )
        state_dict.update(shard.state_dict)
        metadata = {**shard.metadata, **metadata}
    return Checkpoint(state_dict, metadata)
