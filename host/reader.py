"""Checkpoint files by the host's own reader, where its dynamic memory is on.

It maps a file read-only, which Windows charges to nobody, and notes on each tensor where that stands in the
file, from where the host then reads to the device. What safetensors maps can be written to: Windows charges
all of it, and the host would copy it page by page.
"""

from pathlib import Path

import comfy.memory_management
import comfy.utils

from ..wan import files
from ..wan.files import Checkpoint
from ..wan.files.safetensors_file import check_safetensors, read_safetensors

SUFFIXES = (".safetensors", ".sft")  # by which the host tells its kinds of files


def read_checkpoint(path: str | Path) -> Checkpoint:
    """`wan.files.read_checkpoint`; with the host's dynamic memory its tensors must not be written to.

    Raises:
        BadFile: as there.
    """
    dynamic = comfy.memory_management.aimdo_enabled
    return files.read_checkpoint(path, read_one=_read_as_host if dynamic else read_safetensors)


def _read_as_host(path: Path) -> Checkpoint:
    """One file, held against its size first: the host's reader believes what it states."""
    if path.suffix.lower() not in SUFFIXES:
        return read_safetensors(path)
    check_safetensors(path)
    try:
        state_dict, metadata = comfy.utils.load_torch_file(str(path), return_metadata=True)
    except (KeyError, RuntimeError):  # a type that the reader does not have; a file that it cannot map
        return read_safetensors(path)
    return Checkpoint(state_dict, dict(metadata or {}))
