"""The API's side of the pipe to the driver of Ray."""

import asyncio
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from ..settings import SECRETS

ROOT = Path(__file__).resolve().parents[2]
END_SECONDS = 10.0  # for Ray to end its processes
NOT_FOR_STATIONS = ("RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class Link:
    """A driver's process, from its start to its end.

    Args:
        setup: as of `driver.Setup`, with an address of a cluster or None.
        on_news: called on the event loop with each tuple from the driver.
        on_end: called on the event loop with its last words, once it has ended.
    """

    def __init__(self, setup: tuple, on_news: Callable[..., None], on_end: Callable[[str], None]):
        ours, theirs = socket.socketpair()
        self._log: Any = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "workers"), str(theirs.fileno()), "server.stations.driver"],
            env=_environment(os.environ, is_local=setup[1] is None),
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl+C is for this process, which then closes the pipe
        )
        theirs.close()
        self._pipe = Connection(ours.detach())
        self._pipe.send(setup)
        loop = asyncio.get_running_loop()

        def read() -> None:
            with suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(on_news, *self._pipe.recv())
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_end, self._last_words())

        threading.Thread(target=read, name="wan21 stations", daemon=True).start()

    def send(self, *request: Any) -> None:
        """Asks the driver; where it has ended, `on_end` says so."""
        with suppress(OSError):
            self._pipe.send(request)

    def close(self) -> None:
        """Ends the driver and, where Ray was started here, all of it. Blocking."""
        # The thread that reads would keep the socket open.
        with suppress(OSError), socket.socket(fileno=os.dup(self._pipe.fileno())) as end:
            end.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # Of a driver that was killed, Ray's agents would stay for a minute; all are in its session.
        for other in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(other.pid) == self._process.pid:
                    other.kill()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def _environment(environ: Mapping[str, str], is_local: bool) -> dict[str, str]:
    """Of the driver: no secret of the API's, and Ray's token. That of a cluster is the user's own."""
    kept = {k: v for k, v in environ.items() if k not in (*SECRETS, *NOT_FOR_STATIONS)}
    kept |= {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
    # In no file: only this user's processes read it.
    return kept | ({"RAY_AUTH_TOKEN": secrets.token_hex(32)} if is_local else {})
