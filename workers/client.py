"""This process's side: starts the engine when it is needed, asks it, and starts another where it is lost."""

import importlib.util
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

from ..wan.out_of_memory import OutOfMemoryOn
from ..wan.refusal import Refusal
from .process import ROOT, RayProcess
from .wire import Packer

POLL_SECONDS = 0.05  # between looks whether the user has cancelled
REACH_SECONDS = 5.0  # for a cluster to take a connection
CANCEL_SECONDS = 60.0  # for the engine to answer a cancel; it kills who does not come back sooner
HUNG_SECONDS = 20.0  # see `engine.Engine`

Check = Callable[[], object]  # raises when the user has cancelled
Take = Callable[..., object]  # of what comes before an answer; raises as well


class WorkersLost(ConnectionError):
    """No worker is left, and a new engine did not mend it."""


class EngineGone(Exception):
    """The engine process has ended."""


def cannot_run() -> str | None:
    """Why there can be no workers here, as a sentence without its full stop; None when there can be."""
    if sys.platform != "linux":
        return "workers run on Linux (on Windows, in WSL)"
    if importlib.util.find_spec("ray") is None:  # found, not imported
        return "workers need Ray: pip install ray"
    return None


def cannot_join() -> Refusal | None:
    """Why this machine may not join a cluster: without its token, or with one that others can read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not file.is_file():
        return Refusal(
            "WAN21_RAY_ADDRESS is set, and this machine has no token of the cluster, without which anybody "
            "in the network could run code on it",
            f"Copy the head's token to {file} (`ray get-auth-token --generate` makes one)",
        )
    if file.stat().st_mode & 0o077:
        return Refusal(
            f"other users of this machine can read the cluster's token, {file}", f"chmod 600 {file}"
        )
    return None


def unreachable(address: str) -> Refusal | None:
    """Why no cluster can be at an address; Ray itself would try for a quarter of an hour. Blocking."""
    name, _, port = address.rpartition(":")
    try:
        with socket.create_connection((name.strip("[]"), int(port)), REACH_SECONDS):
            return None
    except (OSError, ValueError, OverflowError) as error:
        return not_taken(address, f"nobody answers there: {error}")


def not_taken(address: str, why: str) -> Refusal:
    """That a cluster does not let this machine take part."""
    return Refusal(
        f"the Ray cluster at WAN21_RAY_ADDRESS={address} does not take this machine ({why})",
        "Run `ray start` here with the cluster's address, its token and the same versions, or unset "
        "WAN21_RAY_ADDRESS",
    )


class Setup(NamedTuple):
    """What an engine is started with.

    Attributes:
        count: workers.
        gpus: whether each has a GPU of its own.
        settings, paths, threads: as of `rank.Rank`; settings before they are packed.
        address: of a Ray cluster; empty starts Ray on this machine.
    """

    count: int
    gpus: bool
    settings: dict[str, dict[str, Any]]
    paths: tuple[str, ...]
    threads: int | None
    address: str = ""


class Client:
    """An engine process with so many workers, which lives as long as a model of it is held.

    Attributes:
        told: (name, process, device) of each worker since a model was last loaded.
        notes: sentences on what was done again, not yet taken.
    """

    def __init__(self, setup: Setup, hung_seconds: float = HUNG_SECONDS):
        self.setup = setup
        self.hung_seconds = hung_seconds
        self.lock = RLock()
        self.engine: Any = None  # a RayProcess
        self.told: list[tuple[str, int, str]] = []
        self.notes: list[str] = []
        self.unwanted: list[str] = []  # keys of models that nobody holds any more
        self.generation = 0  # of the workers: models are loaded anew in another one
        self.has_lost = False  # a worker since the last load
        self._stop = weakref.finalize(self, lambda: None)

    @property
    def process(self) -> subprocess.Popen:
        """The engine's, while there is one."""
        return self.engine.process

    def start(self, check: Check) -> int:
        """Starts the engine if there is none. Gives the generation of its workers."""
        with self.lock:
            if self.engine is not None and self.process.poll() is None and self.told:
                return self.generation
            if self.engine is not None and self.told:  # between two questions, where nobody else has seen it
                self.notes.append("the workers were lost and are started again (their engine had ended)")
            self.close()
            self.engine = RayProcess(os.environ, not self.setup.address)
            self._stop.detach()
            self._stop = weakref.finalize(self, _end, self.engine)
            count, gpus, settings, paths, threads, address = self.setup
            packed = Packer().pack(settings).plain()
            self._send((str(ROOT), count, gpus, (packed, paths, threads), self.hung_seconds, address))
            self.told = self._answer(check)
            self.generation += 1
            return self.generation

    def close(self) -> None:
        """Ends the engine and its workers."""
        with self.lock:
            self.told = []
            if self.engine is not None:
                _end(self.engine)

    def request(self, check: Check, *request: Any, take: Take | None = None) -> Any:
        """What the engine answers.

        Args:
            take: of what comes before the answer, each with its arguments.

        Raises:
            Refusal, OutOfMemoryOn, RuntimeError: what a worker raised.
            EngineGone: it did not answer.
            WorkersLost: it has no worker left.
        """
        with self.lock:
            while self.unwanted:
                self._send(("unload", [self.unwanted.pop()]))
                self._answer(check)
            self._send(request)
            return self._answer(check, take)

    def _send(self, request: tuple) -> None:
        try:
            self.engine.pipe.send(request)
        except OSError as error:
            raise EngineGone(self.engine.last_words()) from error

    def _answer(self, check: Check, take: Take | None = None) -> Any:
        """Waits for it, and hands on a cancel: what `check` raised is raised when the workers are idle."""
        try:
            kind, value, notes = self._next(check)
            while kind == "part":
                assert take is not None
                self._or_call_back(take, *value)
                kind, value, notes = self._next(check)
        except (EOFError, OSError) as error:
            raise EngineGone(self.engine.last_words()) from error
        self.notes += notes
        self.has_lost |= bool(notes)
        if kind == "lost":
            raise WorkersLost(value)
        if kind == "failed":
            raise _error_of(value)
        return value

    def _next(self, check: Check) -> tuple[str, Any, list[str]]:
        while not self.engine.pipe.poll(POLL_SECONDS):
            self._or_call_back(check)
        return self.engine.pipe.recv()

    def _or_call_back(self, do: Callable[..., object], *args: Any) -> None:
        try:
            do(*args)
        except BaseException:
            self._call_back()
            raise

    def _call_back(self) -> None:
        """Cancels what the engine does; one that is still starting, or does not answer, is ended."""
        if self.told:
            self._send(("cancel",))
            while self.engine.pipe.poll(CANCEL_SECONDS):
                if self.engine.pipe.recv()[0] != "part":
                    return
        self.close()


def _end(engine: RayProcess) -> None:
    if not engine.pipe.closed:
        engine.end()
        engine.pipe.close()


def _error_of(answer: dict[str, Any]) -> Exception:
    """An answer of a worker as the error that the same call would raise here."""
    if answer["failed"] == "refused":
        return Refusal(answer["why"], answer["fix"])
    if answer["failed"] == "memory":
        where, _, said = answer["why"].partition(": ")
        return OutOfMemoryOn(where, said)
    return RuntimeError(answer["why"])
