"""This process's side: starts the engine when it is needed, asks it, and starts another where it is lost."""

import importlib.util
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor

from ..wan.out_of_memory import OutOfMemoryOn
from ..wan.refusal import Refusal
from .wire import Packer

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05  # between looks whether the user has cancelled
CANCEL_SECONDS = 60.0  # for the engine to answer a cancel; it kills who does not come back sooner
HUNG_SECONDS = 20.0  # see `engine.Engine`
NOT_FOR_WORKERS = ("RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")

Check = Callable[[], object]  # raises when the user has cancelled


class WorkersLost(ConnectionError):
    """No worker is left, and a new engine did not mend it."""


class _EngineGone(Exception):
    """The engine process has ended."""


def cannot_run() -> str | None:
    """Why there can be no workers here, as a sentence without its full stop; None when there can be."""
    if sys.platform != "linux":
        return "workers run on Linux (on Windows, in WSL)"
    if importlib.util.find_spec("ray") is None:  # found, not imported
        return "workers need Ray: pip install ray"
    return None


class Setup(NamedTuple):
    """What an engine is started with.

    Attributes:
        count: workers.
        gpus: whether each has a GPU of its own.
        settings, paths, threads: as of `rank.Rank`; settings before they are packed.
    """

    count: int
    gpus: bool
    settings: dict[str, dict[str, Any]]
    paths: tuple[str, ...]
    threads: int | None


class Client:
    """An engine process with so many workers, which lives as long as a model of it is held.

    Attributes:
        told: (name, process, device) of each worker when it was started.
        notes: sentences on what was done again, not yet taken.
    """

    def __init__(self, setup: Setup, hung_seconds: float = HUNG_SECONDS):
        self.setup = setup
        self.hung_seconds = hung_seconds
        self.lock = RLock()
        self.process: subprocess.Popen | None = None
        self.pipe: Any = None
        self.told: list[tuple[str, int, str]] = []
        self.notes: list[str] = []
        self.unwanted: list[str] = []  # keys of models that nobody holds any more
        self.generation = 0  # of the workers: models are loaded anew in another one
        self.has_lost = False  # a worker since the last load
        self._stop = weakref.finalize(self, lambda: None)

    def start(self, check: Check) -> int:
        """Starts the engine if there is none. Gives the generation of its workers."""
        with self.lock:
            if self.process is not None and self.process.poll() is None and self.told:
                return self.generation
            self.close()
            ours, theirs = socket.socketpair()
            self.log: Any = tempfile.TemporaryFile()  # noqa: SIM115 (read when the engine has ended)
            environment = {k: v for k, v in os.environ.items() if k not in NOT_FOR_WORKERS}
            environment |= {
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),  # in no file: only this user's processes read it
                "RAY_USAGE_STATS_ENABLED": "0",
                "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a lost peer ends the whole process
                "TORCH_NCCL_ENABLE_MONITORING": "0",
                "NCCL_SOCKET_IFNAME": "lo",
                "GLOO_SOCKET_IFNAME": "lo",
            }
            command = [sys.executable, str(ROOT / "workers"), str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C is for this process, which then closes the pipe
            )
            theirs.close()
            self.pipe = Connection(ours.detach())
            self._stop.detach()
            self._stop = weakref.finalize(self, _end, self.pipe, self.process)
            count, gpus, settings, paths, threads = self.setup
            packed = Packer().pack(settings).plain()
            self._send((str(ROOT), count, gpus, (packed, paths, threads), self.hung_seconds))
            self.told = self._answer(check)
            self.generation += 1
            return self.generation

    def close(self) -> None:
        """Ends the engine and its workers."""
        with self.lock:
            self.told = []
            if self.process is not None:
                _end(self.pipe, self.process)
                self.process = None

    def request(self, check: Check, *request: Any) -> Any:
        """What the engine answers.

        Raises:
            Refusal, OutOfMemoryOn, RuntimeError: what a worker raised.
            _EngineGone: it did not answer.
            WorkersLost: it has no worker left.
        """
        with self.lock:
            while self.unwanted:
                self._send(("unload", [self.unwanted.pop()]))
                self._answer(check)
            self._send(request)
            return self._answer(check)

    def _send(self, request: tuple) -> None:
        try:
            self.pipe.send(request)
        except OSError as error:
            raise _EngineGone(self._last_words()) from error

    def _answer(self, check: Check) -> Any:
        """Waits for it, and hands on a cancel: what `check` raised is raised when the workers are idle."""
        try:
            while not self.pipe.poll(POLL_SECONDS):
                try:
                    check()
                except BaseException:
                    self._call_back()
                    raise
            kind, value, notes = self.pipe.recv()
        except (EOFError, OSError) as error:
            raise _EngineGone(self._last_words()) from error
        self.notes += notes
        self.has_lost |= bool(notes)
        if kind == "lost":
            raise WorkersLost(value)
        if kind == "failed":
            raise _error_of(value)
        return value

    def _call_back(self) -> None:
        """Cancels what the engine does; one that is still starting, or does not answer, is ended."""
        if self.told:
            self._send(("cancel",))
            if self.pipe.poll(CANCEL_SECONDS):
                self.pipe.recv()
                return
        self.close()

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _end(pipe: Any, process: subprocess.Popen) -> None:
    pipe.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Of an engine that was killed, Ray's agents would stay for a minute; all are in its session.
    for other in psutil.process_iter():
        with suppress(OSError, psutil.Error):
            if os.getsid(other.pid) == process.pid:
                other.kill()


def _error_of(answer: dict[str, Any]) -> Exception:
    """An answer of a worker as the error that the same call would raise here."""
    if answer["failed"] == "refused":
        return Refusal(answer["why"], answer["fix"])
    if answer["failed"] == "memory":
        where, _, said = answer["why"].partition(": ")
        return OutOfMemoryOn(where, said)
    return RuntimeError(answer["why"])


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _split(groups: Sequence[tuple[int, int]]) -> str:
    """Of (workers, passes) of each group, for people."""
    return " and ".join(
        f"{passes} {'pass' if passes == 1 else 'passes'} on {workers}" for workers, passes in groups
    )


@dataclass
class Counts:
    """What was done for a model in a run.

    Attributes:
        seconds: of each call, as it was waited for.
        workers: (name, seconds in it) by call.
        groups: (workers, passes) of each group, by call.
        sent: bytes between workers, by call.
        notes: sentences on calls that were done again.
    """

    seconds: list[float] = field(default_factory=list)
    workers: list[list[tuple[str, float]]] = field(default_factory=list)
    groups: list[list[tuple[int, int]]] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class RemoteModel:
    """One model that workers hold.

    Args:
        client: their engine.
        made_by: (factory, arguments) by which each worker makes it; the factory is importable there.
        split: of `wan.shard.SPLITS`.
        count: workers that take part.
    """

    def __init__(self, client: Client, made_by: tuple[Callable, tuple], split: str, count: int):
        self.client = client
        self.made_by = made_by
        self.split = split
        self.count = count
        self.key = secrets.token_hex(8)
        self.packer = Packer()
        self.loaded_in = 0  # which generation
        self.counts = Counts()
        weakref.finalize(self, client.unwanted.append, self.key)

    def call(self, asked: object, passes: int, check: Check) -> Tensor:
        """The velocity of all passes of a call [B, 16, T, h, w], float32.

        Args:
            asked: what the model is called with, for `rank.Model.call`.
            passes: how many stand in its batch.
            check: raises when the user has cancelled.
        """
        answer = self._tried(check, lambda: self._called(asked, passes, check))
        self.counts.seconds.append(answer["seconds"])
        self.counts.workers.append(answer["workers"])
        self.counts.groups.append(answer["groups"])
        self.counts.sent.append(answer["sent"])
        return torch.cat([torch.from_numpy(v) for v in answer["velocities"]])

    def ask(self, check: Check, name: str, *args: Any) -> Sequence[Any]:
        """What a method of the model gives, of each worker."""
        return self._tried(check, lambda: self.client.request(check, "ask", self.key, name, *args))

    def make_room(self, check: Check) -> bool:
        """Lets go of what the devices hold beside a step; False: nothing was left on any."""
        try:
            return any(self.ask(check, "make_room"))
        except WorkersLost:  # the step itself finds it out
            return False

    def report(self) -> list[str]:
        """Sentences on the calls of the run so far."""
        counts = self.counts
        if not counts.seconds:
            return list(counts.notes)
        steady = counts.seconds[1:] or counts.seconds  # the first also loads the model
        names = dict(one for call in counts.workers for one in call)
        shares = ", ".join(
            f"{name} {_mean([s for call in counts.workers for n, s in call if n == name]):.2f} s"
            for name in sorted(names)
        )
        splits = dict.fromkeys(tuple(groups) for groups in counts.groups)
        return [
            f"workers: {len(names)}, split {self.split}: {'; '.join(map(_split, splits))}",
            f"workers: {_mean(steady):.2f} s a call of the model, of which {shares}; "
            f"{_mean(counts.sent) / 1e6:.1f} MB a call between them",
            *counts.notes,
        ]

    def end(self) -> None:
        """Lets the workers drop what belongs to the run that has ended."""
        self.packer.forget()
        self.counts = Counts()
        if self.client.told and self.loaded_in == self.client.generation:
            try:
                self.client.request(lambda: None, "ask", self.key, "end")
            except (_EngineGone, WorkersLost):
                self.client.close()  # the next run starts another
        if self.client.has_lost:  # the next run has them replaced
            self.client.has_lost = False
            self.client.generation += 1

    def _called(self, asked: object, passes: int, check: Check) -> dict[str, Any]:
        message = self.packer.pack(asked).plain()
        return self.client.request(check, "call", self.key, message, passes, self.split, self.count)

    def _tried(self, check: Check, do: Callable[[], Any]) -> Any:
        """With a new engine where the first is gone, or has no worker left."""
        for is_last in (False, True):
            try:
                self._load(check)
                return do()
            except (_EngineGone, WorkersLost) as error:
                self.client.close()
                if is_last:
                    raise WorkersLost(f"the workers are lost ({error})") from error
                self.counts.notes.append(f"the workers were lost and are started again ({error})")
            except BaseException:
                self.packer.forget()  # it may not have come
                raise
            finally:
                self.counts.notes += self.client.notes
                self.client.notes = []

    def _load(self, check: Check) -> None:
        generation = self.client.start(check)
        if generation != self.loaded_in:
            self.packer.forget()
            message = Packer().pack(self.made_by).plain()
            self.client.request(check, "load", self.key, message)
            self.loaded_in = generation
