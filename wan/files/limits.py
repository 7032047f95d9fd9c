"""Bounds on what a file may state, far above every published model, so that none takes memory or time for it.

They are held against the file before anything is built, unpacked or walked through by the number it gives.
"""

import json
from collections.abc import Iterable
from typing import Any

import torch

from ..refusal import Refusal
from .bad_file import AGAIN, listed

MAX_TENSORS = 100_000  # in a file; the largest published DiT has some 2,000, scales included
MAX_RANK = 64  # axes of a tensor, of which safetensors has no bound
MAX_KEY_LENGTH = 500  # characters; patterns are matched against keys
MAX_KEYS_LENGTH = 4_000_000  # of all keys together; those of a whole pipeline of 14B take some 300,000
MAX_TABLE_BYTES = 4_000_000  # of a JSON table in the metadata; marks of all layers of 14B take some 50,000
MAX_BLOCKS = 256  # of a DiT or an encoder; releases have 24 to 40
MAX_SIGNS = 4_000_000  # commas and brackets of a JSON text, by which the memory that it takes is bounded
MAX_SIDE = 2**20  # numbers along one axis that a model is built with; umT5's vocabulary has 256,384
FLOATS = (  # in which weights and LoRAs are published
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
)  # fmt: skip


def count_blocks(numbers: Iterable[str], what: str = "blocks") -> int:
    """How many blocks there are, by their numbers as texts, each as often as it likes.

    Raises:
        Refusal: they are not 0 to n - 1, or more than `MAX_BLOCKS`.
    """
    found = set(numbers)
    if len(found) > MAX_BLOCKS:
        raise Refusal(
            f"it numbers {len(found)} {what}, and models have up to {MAX_BLOCKS}", "Pick a file of Wan2.1"
        )
    missing = [str(number) for number in range(len(found)) if str(number) not in found]
    if missing:
        stray = sorted(found - {str(number) for number in range(len(found))})
        raise Refusal(
            f"its {what} are not numbered from 0 without a gap: {listed(missing)} missing, "
            f"{listed([number[:40] for number in stray])} there",
            f"The file is incomplete or damaged. {AGAIN}",
        )
    return len(found)


def check_keys_length(keys: Iterable[str]) -> None:
    """Holds the length of all keys together against `MAX_KEYS_LENGTH`.

    Raises:
        Refusal: they are longer.
    """
    length = sum(map(len, keys))
    if length > MAX_KEYS_LENGTH:
        raise Refusal(
            f"the names of its tensors take {length} letters, and up to {MAX_KEYS_LENGTH} are read",
            "Pick another file",
        )


def check_sides(sides: dict[str, int]) -> None:
    """Holds sizes that a model is to be built with against `MAX_SIDE`, by name.

    Raises:
        Refusal: one is not from 1 to that.
    """
    for name, side in sides.items():
        if not 1 <= side <= MAX_SIDE:
            raise Refusal(f"its {name} is {side}; sizes from 1 to {MAX_SIDE} are read", AGAIN)


def json_table(text: str | bytes, what: str) -> dict[str, Any]:
    """A table from metadata, `what` by name.

    Raises:
        Refusal: the text is no JSON, of another form or longer than `MAX_TABLE_BYTES`.
    """
    if len(text) > MAX_TABLE_BYTES:
        raise Refusal(f"{what} has {len(text)} bytes, and up to {MAX_TABLE_BYTES} are read", AGAIN)
    try:
        table = load_json(text.encode() if isinstance(text, str) else text)
    except (ValueError, RecursionError) as error:  # nested too deep for Python's parser
        raise Refusal(f"{what} is no JSON", AGAIN) from error
    if not isinstance(table, dict):
        raise Refusal(f"{what} must be a JSON table", AGAIN)
    return table


def load_json(raw: bytes, **options: Any) -> Any:
    """JSON that takes no more memory than some times its size.

    Raises:
        ValueError: it is none, or has more than `MAX_SIGNS`.
        RecursionError: it is nested too deep.
    """
    if sum(raw.count(sign) for sign in (b",", b"[", b"{")) > MAX_SIGNS:
        raise ValueError("too many entries")
    return json.loads(raw, **options)
