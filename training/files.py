"""What is written whole or not at all.

Every file of `models/` has its numbers in float16, and says which code made it.
"""

import os
import subprocess

import torch
from lib.pack import ROOT
from safetensors.torch import load_file, save_file


def stored(tensors):
    """float16, but for bytes.

    Raises:
        ValueError: a weight is not finite, or too large for float16: that training has diverged.
    """
    halves = {
        name: (tensor if tensor.dtype == torch.uint8 else tensor.half()).contiguous().cpu()
        for name, tensor in tensors.items()
    }
    broken = [name for name, tensor in halves.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{broken[0]} is not finite in float16: the training diverged, do its stage again")
    return halves


def write(tensors, path, metadata):
    """Save what `stored` gave, whole or not at all, for all to read: safetensors lets its owner only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.chmod(0o644)
    os.replace(unfinished, path)


def holds(path, tensors):
    """Whether a file has just these tensors."""
    if not path.exists():
        return False
    there = load_file(path)
    return there.keys() == tensors.keys() and all(torch.equal(there[name], tensors[name]) for name in there)


def write_text(path, text):
    """Whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def commit():
    result = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() or "unknown"
