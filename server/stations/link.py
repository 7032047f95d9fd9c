"""The API's side of the pipe to the driver of Ray."""

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from ...workers.process import RayProcess
from ..settings import SECRETS

NOT_FOR_STATIONS = ("RAY_ADDRESS", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


class Link:
    """A driver's process, from its start to its end.

    Args:
        setup: as of `driver.Setup`, with an address of a cluster or None.
        on_news: called on the event loop with each tuple from the driver.
        on_end: called on the event loop with its last words, once it has ended.
    """

    def __init__(self, setup: tuple, on_news: Callable[..., None], on_end: Callable[[str], None]):
        self._driver = RayProcess(_environment(os.environ), setup[1] is None, "server.stations.driver")
        self._pipe = self._driver.pipe
        self._pipe.send(setup)
        loop = asyncio.get_running_loop()

        def read() -> None:
            with suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(on_news, *self._pipe.recv())
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(on_end, self._driver.last_words())

        threading.Thread(target=read, name="wan21 stations", daemon=True).start()

    def send(self, *request: Any) -> None:
        """Asks the driver; where it has ended, `on_end` says so."""
        with suppress(OSError):
            self._pipe.send(request)

    def close(self) -> None:
        """Ends the driver and, where Ray was started here, all of it. Blocking."""
        self._driver.end()


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Of the driver: no secret of the API's."""
    return {k: v for k, v in environ.items() if k not in (*SECRETS, *NOT_FOR_STATIONS)}
