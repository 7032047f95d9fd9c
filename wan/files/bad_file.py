"""What is said about a file that cannot be read, and what a file that is no safetensors file looks like."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..refusal import Refusal

AGAIN = "Download it again"


class Checkpoint(NamedTuple):
    """Tensors by name, and the text metadata of the file (empty where it has none)."""

    state_dict: dict[str, Tensor]
    metadata: dict[str, str]


class BadFile(Refusal):
    """A file that cannot be read. Its own name stands in front of the problem."""


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, a refusal gets a file's name in front, unless it has that of another file (one shard of a set).

    Raises:
        BadFile: in place of any other `Refusal`.
    """
    try:
        yield
    except BadFile:
        raise
    except Refusal as error:
        raise BadFile(f"{name}: {error.problem}", error.fix) from error
    except OSError as error:
        raise BadFile(
            f"{name}: the system does not read it ({error.strerror or error})",
            "Look at the file and its rights",
        ) from error


def check_is_file(path: Path) -> None:
    """Refuses a path where no file is.

    Raises:
        Refusal: there is nothing, a folder, or a pipe.
    """
    if not path.is_file():
        raise Refusal(
            "there is no file of this name: it was moved, deleted or never fully downloaded",
            "Download it again, or pick another file",
        )


def listed(names: Iterable[str], limit: int = 10) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as safetensors: 8 bytes of header length, then a JSON table."""
    return head[8:9] == b"{"


def not_safetensors(head: bytes, size: int) -> Refusal:
    """The refusal of a file that is no safetensors file: what it looks like, and what to do about it.

    Args:
        head, size: as of `other_file`.
    """
    if head.startswith(b"GGUF"):
        return Refusal(
            "a GGUF file; only diffusion models and umT5 are read as GGUF, under .gguf names",
            "Pick a safetensors file",
        )
    return other_file(head, size) or Refusal(
        "not a safetensors file: it is damaged or of another format", "Download a safetensors version"
    )


def other_file(head: bytes, size: int) -> Refusal | None:
    """The refusal of a file that is often found in place of a model, by its look; None for any other.

    Args:
        head: its first bytes, 1024 or more where it has them.
        size: of the whole file, in bytes.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if size == 0:
        return Refusal("empty (0 bytes): the download failed", AGAIN)
    if text.startswith(b"version https://git-lfs"):
        stands_for = re.search(rb"\nsize (\d{1,20})", head)
        real = f" for a file of {int(stands_for[1])} bytes" if stands_for else ""
        return Refusal(
            f"a Git LFS pointer ({size} bytes of text standing{real}), not the model",
            "Run `git lfs pull` in its repository, or download the file itself",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return Refusal(
            "a web page, not a model: the link led to a page (often a log-in or licence page)",
            "Open the link in a browser, accept what it asks, and download the file itself",
        )
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")):
        return Refusal(
            "a PyTorch pickle (.pt, .pth, .ckpt or .bin), not safetensors; pickles can run code, so it is "
            "not opened",
            "Download or pick a safetensors version (only the Wan2.1 release's own VAE and text encoder are "
            "read as pickles, under their .pth names)",
        )
    if text.startswith((b"{", b"[")):
        return Refusal("a JSON text (a configuration or an error message)", "Download the model file itself")
    if not any(head):
        return Refusal("starts with zeros only: an unfinished download", AGAIN)
    return None
