"""GGUF, the container: what a file states is held against its size before it is walked through.

A number of 24 bytes' head can claim 2^62 values, so nothing is read by a count alone: texts and arrays end
within the file, their number is bounded, and values are unpacked only when they are asked for. Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

import math
import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ..refusal import Refusal
from .bad_file import AGAIN, check_is_file, other_file
from .limits import MAX_KEY_LENGTH, MAX_TENSORS, check_keys_length

MAX_ITEMS = 2_000_000  # of all text lists together, or of one list that is unpacked; umT5 has 256,384 pieces
MAX_AXES = 4
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


class Place(NamedTuple):
    """Where a value of the metadata stands.

    Attributes:
        kind: number of its type, of its items for a list.
        count: of items; None for a single value.
        start: of its first byte.
    """

    kind: int
    count: int | None
    start: int


class Stored(NamedTuple):
    """A tensor as the head describes it.

    Attributes:
        kind: number of its type.
        shape: rows last.
        offset: of its first byte, from the beginning of the data.
    """

    kind: int
    shape: tuple[int, ...]
    offset: int


class Container:
    """The head of a GGUF file.

    Attributes:
        path: of the file.
        size: of the file, in bytes.
        places: of the metadata, by key.
        tensors: by name.
        data_start: of the first byte of the tensors.
        alignment: that offsets of tensors are multiples of.

    Raises:
        Refusal: the file is something else, truncated or damaged.
    """

    def __init__(self, path: Path):
        check_is_file(path)
        self.path, self.size = path, path.stat().st_size
        with path.open("rb") as file:
            head = file.read(1024)
            _check_start(head, self.size)
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        num_tensors, num_values = struct.unpack_from("<QQ", head, 8)
        if max(num_tensors, num_values) > MAX_TENSORS:
            raise Refusal(
                f"its head is damaged: it states {num_tensors} tensors and {num_values} values, and up to "
                f"{MAX_TENSORS} are read",
                AGAIN,
            )
        self._at, self._items = 24, 0
        self.places = dict(self._value_place() for _ in range(num_values))
        if len(self.places) < num_values:
            raise Refusal("its head is damaged: it gives a value of the metadata twice", AGAIN)
        self.tensors = dict(self._stored() for _ in range(num_tensors))
        if len(self.tensors) < num_tensors:
            raise Refusal("its head is damaged: two tensors have one name", AGAIN)
        check_keys_length(self.tensors)
        self.alignment = self._alignment()
        self.data_start = -(-self._at // self.alignment) * self.alignment

    def value(self, key: str) -> Any:
        """A value of the metadata: a number, a text or a list (`bytes` if of uint8); None if absent.

        Raises:
            Refusal: a text is no UTF-8, or a list is longer than `MAX_ITEMS`.
        """
        place = self.places.get(key)
        if place is None:
            return None
        if place.count is not None and place.count > MAX_ITEMS:
            raise Refusal(
                f"{key} in its metadata is a list of {place.count}, and up to {MAX_ITEMS} are read", AGAIN
            )
        self._at = place.start
        if place.kind == _TEXT:
            texts = [self._text(key) for _ in range(1 if place.count is None else place.count)]
            return texts[0] if place.count is None else texts
        code = _NUMBERS[place.kind]
        values = struct.unpack_from(
            f"<{1 if place.count is None else place.count}{code}", self._data, self._at
        )
        if place.count is None:
            return values[0]
        return bytes(values) if code == "B" else list(values)

    # --- walking through the head ---------------------------------------------------------------------------

    def _skip(self, count: int) -> int:
        """Passes bytes and gives where they began; never past the end of the file."""
        start, end = self._at, self._at + count
        if end > self.size:
            raise Refusal(
                f"truncated or damaged: its head goes on for {count} bytes at {start} of {self.size}", AGAIN
            )
        self._at = end
        return start

    def _number(self, code: str) -> int:
        code = "<" + code
        return struct.unpack_from(code, self._data, self._skip(struct.calcsize(code)))[0]

    def _text(self, what: str) -> str:
        length = self._number("Q")
        start = self._skip(length)
        try:
            return self._data[start : start + length].decode()
        except UnicodeDecodeError as error:
            raise Refusal(f"damaged: {what} is no text (UTF-8)", AGAIN) from error

    def _name(self, what: str) -> str:
        start, length = self._at, self._number("Q")
        if length > MAX_KEY_LENGTH:
            raise Refusal(
                f"its head is damaged: {what} at {start} is {length} bytes long, and up to {MAX_KEY_LENGTH} "
                "are read",
                AGAIN,
            )
        self._at = start
        return self._text(what)

    def _value_place(self) -> tuple[str, Place]:
        key = self._name("a key of the metadata")
        kind, count = self._number("I"), None
        if kind == _LIST:
            kind, count = self._number("I"), self._number("Q")
        start = self._at
        if kind in _NUMBERS:
            self._skip((1 if count is None else count) * struct.calcsize("<" + _NUMBERS[kind]))
        elif kind == _TEXT:
            self._pass_texts(key, 1 if count is None else count)
        else:
            raise Refusal(f"its head is damaged: {key} in the metadata is of no known type ({kind})", AGAIN)
        return key, Place(kind, count, start)

    def _pass_texts(self, key: str, count: int) -> None:
        self._items += count
        if self._items > MAX_ITEMS:
            raise Refusal(
                f"its head is damaged: with {key} the metadata has {self._items} texts, and up to "
                f"{MAX_ITEMS} are read",
                AGAIN,
            )
        for _ in range(count):
            self._skip(self._number("Q"))

    def _stored(self) -> tuple[str, Stored]:
        name = self._name("the name of a tensor")
        axes = self._number("I")
        if not 1 <= axes <= MAX_AXES:
            raise Refusal(f"its head is damaged: {name} has {axes} axes, and 1 to {MAX_AXES} are read", AGAIN)
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        return name, Stored(self._number("I"), shape, self._number("Q"))

    def _alignment(self) -> int:
        at = self._at
        alignment = self.value("general.alignment") if "general.alignment" in self.places else 32
        self._at = at
        is_whole = isinstance(alignment, int) and not isinstance(alignment, bool)
        if not is_whole or not 8 <= alignment <= 2**20 or math.log2(alignment) % 1:
            raise Refusal("its head is damaged: general.alignment must be a power of two from 8 on", AGAIN)
        return alignment


def _check_start(head: bytes, size: int) -> None:
    if head[:4] != b"GGUF":
        raise other_file(head, size) or Refusal("not a GGUF file, or its head is damaged", AGAIN)
    if len(head) < 24:
        raise Refusal(f"truncated: it has {size} bytes, and the head of a GGUF file alone takes 24", AGAIN)
    version = int.from_bytes(head[4:8], "little")
    if version and version % 2**16 == 0:
        raise Refusal("a GGUF file for big-endian machines", "Pick the ordinary, little-endian one")
    if version not in (2, 3):
        raise Refusal(f"a GGUF file of version {version}, and 2 and 3 are read", "Pick another file")
