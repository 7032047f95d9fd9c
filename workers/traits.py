"""What has to be the same on all machines, for the same numbers and the same words between processes."""

import hashlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path

import torch

CODE = ("wan", "host", "workers")  # what computes, and what is said to workers


def traits(root: str, paths: Sequence[str]) -> dict[str, str]:
    """Versions by name.

    Args:
        root: folder of this package.
        paths: of the host.
    """
    files = sorted(file for folder in CODE for file in Path(root, folder).rglob("*.py"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + file.read_bytes())
    found = {
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "this pack": digest.hexdigest()[:12],
    }
    for path in paths:
        if (file := Path(path, "comfyui_version.py")).is_file():
            told = re.search(r'__version__ = "(.+?)"', file.read_text(encoding="utf-8"))
            found["ComfyUI"] = told[1] if told else "?"
    return found


def difference(here: dict[str, str], there: dict[str, str]) -> str:
    """What differs, in words; empty if nothing does."""
    return " and ".join(
        f"{name} {there.get(name, 'is missing')} (here {here[name]})"
        for name in here
        if here[name] != there.get(name)
    )
