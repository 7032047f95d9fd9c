"""One worker, in its process: models on its device, and its part of each call of them."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..wan.out_of_memory import is_out_of_memory
from ..wan.refusal import Refusal
from ..wan.run_state import forget_states
from ..wan.shard import WHOLE, Shard, Ulysses
from .traits import traits
from .wire import Message, Part, message_of, part_of, unpack

MEET_SECONDS = 15  # for all of a group to come to it; less than the engine waits for who is called back
EXCHANGE_SECONDS = 1800  # for the slowest to come to an exchange; who hangs is noticed by the engine

Answer = dict[str, Any]  # plain data and numpy arrays: {"value": ...}, or {"failed": kind, "why": ...}


class Stopped(Exception):
    """The engine wants this call no more."""


class Model(Protocol):
    """What a worker holds: made by the factory that a message names, from what it brings."""

    def call(self, asked: Any, passes: Sequence[int], shard: Shard, watch: Callable[[], None]) -> Tensor:
        """The velocity of some of the passes.

        Args:
            asked: what the model is called with.
            passes: which of its passes, by their place.
            shard: the tokens that are here.
            watch: to be called before each block; raises when the call is wanted no more.
        """
        ...

    def end(self) -> None:
        """Drops what belongs to the run that has ended."""
        ...


class Decoder(Protocol):
    """A VAE that a worker holds, made as a `Model` is."""

    def pieces(
        self, asked: Any, place: tuple[int, ...], watch: Callable[[], None]
    ) -> Iterator[tuple[tuple[int, ...], Tensor, list[str]]]:
        """What is decoded of a part of a clip, as it comes: its place, pixels, sentences to be told.

        Args:
            asked: what is decoded.
            place: of the part.
            watch: as of `Model.call`.
        """
        ...

    def end(self) -> None:
        """As of `Model`."""
        ...


class Rank:
    """The models of a worker and the groups that it is in.

    Args:
        settings: `unpack`ed, objects by `module:name` and the attributes that they are given before anything
            else is imported.
        paths: to put before those of Python's modules.
        threads: of PyTorch; None leaves its own choice.
    """

    def __init__(self, settings: tuple, paths: Sequence[str], threads: int | None):
        self.paths = paths
        sys.path[:0] = paths
        if threads is not None:
            torch.set_num_threads(threads)
        message = message_of(settings)
        for place, values in unpack(message, message.parts).items():
            module, _, name = place.partition(":")
            vars(getattr(import_module(module), name)).update(values)
        self.models: dict[str, Any] = {}  # `Model` or `Decoder`
        self.pieces: Iterator[Any] = iter(())
        self.groups: dict[str, Any] = {}
        self.left: list[Any] = []
        self.blocks = 0
        self.stopped = -1

    # --- one after the other --------------------------------------------------------------------------

    def load(self, key: str, message: Message, parts: Mapping[int, Part]) -> Answer:
        """Makes a model by `(factory, arguments)`, once."""
        if key in self.models:
            return {"value": None}
        return self._answered(self._make, key, message, parts)

    def _make(self, key: str, message: Message, parts: Mapping[int, Part]) -> None:
        factory, arguments = unpack(message, parts)
        self.models[key] = factory(*arguments)

    def unload(self, key: str) -> None:
        """Drops a model."""
        self.models.pop(key, None)

    def ask(self, key: str, name: str, *args: Any) -> Answer:
        """A method of a model, for plain data and tensors."""
        return self._answered(lambda: getattr(self.models[key], name)(*args))

    def call(
        self,
        key: str,
        attempt: int,
        message: Message,
        numbers: Sequence[int],
        passes: Sequence[int],
        place: tuple[str, str, int, int],
        *parts: tuple,
    ) -> Answer:
        """Some passes of a call of a model, the tokens shared with the others of a group.

        Args:
            attempt: number of the call; see `stop`.
            numbers, parts: of the message.
            place: name of the group, the file where it meets, this rank in it and its size.
        """
        begin = time.perf_counter()

        def watch() -> None:
            self.blocks += 1
            self._check(attempt)

        def computed() -> Answer:
            self._check(attempt)
            shard = self._shard(*place, attempt)
            asked = unpack(message, dict(zip(numbers, (Part(*part) for part in parts))))
            v = self.models[key].call(asked, passes, shard, watch)
            self._check(attempt)  # an aborted exchange of NCCL returns as if it were done
            sent = shard.bytes_sent if isinstance(shard, Ulysses) else 0
            value = v.float().cpu().numpy() if place[2] == 0 else None  # all of a group have the same
            return {"velocity": value, "sent": sent, "seconds": time.perf_counter() - begin}

        answer = self._answered(computed)
        if answer.get("failed") in ("error", "peer") and attempt <= self.stopped:
            answer["failed"] = "stopped"
        return answer

    def begin(
        self, key: str, attempt: int, message: Message, numbers: Sequence[int], place: tuple, *parts: tuple
    ) -> Answer:
        """Begins a part of a decode, as `take` goes on with it; the other arguments are those of `call`."""

        def watch() -> None:
            self.blocks += 1
            self._check(attempt)

        def begun() -> Any:
            asked = unpack(message, dict(zip(numbers, (Part(*part) for part in parts))))
            self.pieces = self.models[key].pieces(asked, place, watch)
            return self._piece()

        return self._answered(begun)

    def take(self) -> Answer:
        """(place, part, sentences) of what comes next of the decode that was begun, None after the last."""

        return self._answered(self._piece)

    def _piece(self) -> tuple | None:
        for place, pixels, said in self.pieces:
            return place, tuple(part_of(pixels)), said
        return None

    def _answered(self, do: Callable, *args: Any) -> Answer:
        """What a function gives, or why it failed: an error itself may not be known to who asked."""
        try:
            with torch.inference_mode():
                value = do(*args)
            return {"value": value.cpu().numpy() if isinstance(value, Tensor) else value}
        except Stopped:
            return {"failed": "stopped", "why": ""}
        except Refusal as refusal:
            return {"failed": "refused", "why": refusal.problem, "fix": refusal.fix}
        except Exception as error:
            kind = "memory" if is_out_of_memory(error) else "error"
            if isinstance(error, PeerLost):
                kind = "peer"
            return {"failed": kind, "why": f"{type(error).__name__}: {error}"}

    def forget(self) -> None:
        """Drops what options keep from step to step: a pass, or some of its tokens, will be elsewhere."""
        forget_states()

    def leave(self) -> None:
        """Out of all groups. NCCL's give their memory back at once; Gloo's are kept: one whose exchange
        never ended waits for it when it is freed."""
        self.pieces = iter(())
        for group in self.groups.values():
            if group.name() == "nccl":
                group.abort()
            else:
                self.left.append(group)
        self.groups = {}

    def _shard(self, name: str, meeting: str, rank: int, size: int, attempt: int) -> Shard:
        if size == 1:
            return WHOLE
        if name not in self.groups:
            try:
                self.groups[name] = _meet(meeting, name, rank, size)
            except RuntimeError as error:
                raise PeerLost(str(error)) from error
        return _Watched(self.groups[name], check=lambda: self._check(attempt))

    def _check(self, attempt: int) -> None:
        if attempt <= self.stopped:
            raise Stopped

    # --- at any time ----------------------------------------------------------------------------------

    def where(self) -> tuple[int, int, str]:
        """(process, blocks done so far, device): an answer says that the process lives."""
        return os.getpid(), self.blocks, _device_name()

    def traits(self, root: str) -> dict[str, str]:
        """Those of this machine."""
        return traits(root, self.paths)

    def stop(self, attempt: int) -> None:
        """Lets no call up to this number go on."""
        self.stopped = max(self.stopped, attempt)
        for group in list(self.groups.values()):
            if group.name() == "nccl":
                group.abort()


class PeerLost(RuntimeError):
    """Another of the group does not answer."""


class _Watched(Ulysses):
    """Tells a lost peer from an error of our own."""

    def _wait(self, work: Any, send: Tensor) -> None:
        try:
            super()._wait(work, send)
        except RuntimeError as error:
            raise PeerLost(str(error)) from error


def _device_name() -> str:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"


def _meet(meeting: str, name: str, rank: int, size: int) -> Any:
    """A group of processes of this machine, which find each other by a file: no port but the group's."""
    c10d: Any = dist
    Path(meeting).parent.mkdir(
        mode=0o700, exist_ok=True
    )  # not there yet on another machine than the engine's
    store = c10d.PrefixStore(name, c10d.FileStore(meeting, size))
    store.set_timeout(timedelta(seconds=MEET_SECONDS))
    store.set(f"here {rank}", "")
    store.wait([f"here {one}" for one in range(size)])  # NCCL, once it connects, waits without an end
    if torch.cuda.is_available():
        options = c10d.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=EXCHANGE_SECONDS)
        group = c10d.ProcessGroupNCCL(store, rank, size, options)
        group.eager_connect_single_device(torch.device("cuda", 0))  # else at the first exchange
        return group
    options = c10d.ProcessGroupGloo._Options()
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=EXCHANGE_SECONDS)
    return c10d.ProcessGroupGloo(store, rank, size, options)
