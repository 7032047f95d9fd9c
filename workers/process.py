"""A process of ours that drives Ray, from its start to its end: the engine, and the driver of stations."""

import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
END_SECONDS = 10.0  # for Ray to end its processes


class RayProcess:
    """`python workers FD [MODULE]`, with a pipe to it.

    Args:
        environ: of the process, to which Ray's token is added.
        is_local: whether it starts a Ray of its own; the token of a cluster is the user's own.
        module: as of `workers/__main__.py`.
    """

    def __init__(self, environ: Mapping[str, str], is_local: bool, *module: str):
        ours, theirs = socket.socketpair()
        self._log: Any = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        environment = {**environ, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
        environment.pop("RAY_ADDRESS", None)
        if is_local:  # in no file: only this user's processes read it
            environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        else:  # a second each, for a cluster that does not take us
            environment.setdefault("RAY_NUM_REDIS_GET_RETRIES", "5")
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "workers"), str(theirs.fileno()), *module],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl+C is for this process, which then closes the pipe
        )
        theirs.close()
        self.pipe = Connection(ours.detach())

    def end(self) -> None:
        """Ends it and, where it started Ray, all of that. Blocking."""
        # A thread that reads would keep the socket open.
        with suppress(OSError), socket.socket(fileno=os.dup(self.pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        try:
            self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # Of one that was killed, Ray's agents would stay for a minute; all are in its session.
        for other in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(other.pid) == self.process.pid:
                    other.kill()

    def last_words(self) -> str:
        """The last line that it printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"
