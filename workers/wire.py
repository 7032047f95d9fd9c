"""Values between processes that hold this package under different names, with their tensors beside them.

A value is pickled, and a tensor in it is a number that stands for a part: its bytes, which Ray keeps in
memory that all processes of a machine read. What equals a part of the last message is not sent again: context
and image latent go once in a run, and both passes share one noisy latent.
"""

import io
import pickle
from collections.abc import Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

PACK = __name__.rpartition(".workers.")[0]
SMALL = 4096  # bytes of a tensor that stays in the message


class Part(NamedTuple):
    """A tensor as bytes.

    Attributes:
        dtype: its name in torch.
        shape: of the tensor.
        data: numpy array of uint8.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Any


class Message(NamedTuple):
    """A value ready to be sent.

    Attributes:
        sender: name of this package where it was packed.
        data: the pickled value.
        uses: numbers of its parts.
        parts: those of them that were not in the message before.
    """

    sender: str
    data: bytes
    uses: tuple[int, ...]
    parts: dict[int, Part]

    def plain(self) -> tuple:
        """Without the names of this package's classes, which another process knows by another."""
        return (*self[:3], {number: tuple(part) for number, part in self.parts.items()})


def message_of(plain: tuple) -> Message:
    """The message that was made `plain`."""
    sender, data, uses, parts = plain
    return Message(sender, data, uses, {number: Part(*part) for number, part in parts.items()})


class Packer:
    """Makes messages, and knows the parts of the last one."""

    def __init__(self):
        self._numbers = count()
        self._last: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Makes the next message bring all its parts: who has the last one is gone."""
        self._last = {}

    def pack(self, value: object) -> Message:
        """The message of a value of plain data, tensors and objects of importable classes."""
        buffer, used, new = io.BytesIO(), {}, {}

        class Pickler(pickle.Pickler):
            def persistent_id(_, obj: Any) -> int | None:
                if not isinstance(obj, Tensor) or obj.nbytes < SMALL:
                    return None
                tensor = obj.detach().cpu().contiguous()
                known = (*used.items(), *self._last.items())
                number = next((n for n, other in known if _equal(tensor, other)), None)
                if number is None:
                    number = next(self._numbers)
                    new[number] = part_of(tensor)
                used[number] = tensor
                return number

            def reducer_override(self, obj: Any) -> Any:
                if not isinstance(obj, Tensor):
                    return NotImplemented
                dtype, shape, data = part_of(obj.detach().cpu().contiguous())
                return tensor_of, (dtype, shape, data)

        Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(value)
        # Copies: somebody may write to what he gave us, before the next message.
        self._last = {n: self._last[n] if n in self._last else tensor.clone() for n, tensor in used.items()}
        return Message(PACK, buffer.getvalue(), tuple(used), new)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def part_of(tensor: Tensor) -> Part:
    """The bytes of a tensor on the CPU, copied."""
    data = tensor.flatten().view(torch.uint8).numpy().copy()
    return Part(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data)


def tensor_of(dtype: str, shape: tuple[int, ...], data: Any) -> Tensor:
    """The tensor of a `Part`, with memory of its own."""
    return torch.from_numpy(data.copy()).view(getattr(torch, dtype)).view(shape)


def unpack(message: Message, parts: Mapping[int, Part]) -> Any:
    """The value of a message; its tensors are copies.

    Args:
        parts: at least those that it uses.
    """

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module == message.sender or module.startswith(message.sender + "."):
                module = PACK + module[len(message.sender) :]
            return super().find_class(module, name)

        def persistent_load(self, pid: Any) -> Tensor:
            return tensor_of(*parts[pid])

    return Unpickler(io.BytesIO(message.data)).load()
