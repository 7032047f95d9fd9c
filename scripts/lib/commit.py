"""Which state of this tree a result is of."""

import subprocess

from .pack import ROOT

FILE = "COMMIT"  # in a packed tree, which has no .git


def commit() -> str:
    """Of this tree, with `-dirty` where files differ from it; "not known" without git."""
    if (ROOT / FILE).is_file():
        return (ROOT / FILE).read_text(encoding="utf-8").strip()
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=9", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not known"
