"""Puts the parts of the API together and ties them to the life of the web server."""

import asyncio
import atexit
import contextlib
import logging
from collections.abc import AsyncIterator, Collection
from typing import TYPE_CHECKING

from aiohttp import web
from filelock import FileLock, Timeout
from sqlalchemy.exc import DatabaseError

from ..workers import cannot_join, cannot_run
from .access import Gate, RateLimit, is_local
from .files import Files
from .fleet import Fleet
from .installed import Installed
from .jobs import Jobs
from .pictures import Pictures
from .problems import Problem
from .routes import Handler, Routes
from .sessions import Sessions
from .settings import Settings
from .store import Store
from .tasks import Tasks
from .webhooks import Webhooks

if TYPE_CHECKING:
    from ..host.queue import Host

CLEAN_SECONDS = 3600  # between removals of files whose time is up


def create_app(host: "Host", weight_formats: Collection[str] | None = None) -> web.Application:
    """The aiohttp application of the API.

    Args:
        weight_formats: quantised formats that the host's layers read; None is all.

    Raises:
        ValueError: a setting is wrong.
        RuntimeError: another server of this user folder has the API open.
    """
    settings = Settings.from_environment()
    fleet = _fleet(host, settings)
    folder = host.data_directory
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RuntimeError(f"another server uses {folder}; give each a user folder of its own") from None
    store = Store(folder / "jobs.sqlite")
    files = Files(store, settings, folder / "uploads")
    pictures = Pictures(store, settings, files, host.input_directory)
    hooks = Webhooks(store, settings)
    queue = fleet or host
    tasks = Tasks(store, queue, host.output_directory, hooks.wake)
    if fleet is not None:
        fleet.on_given = tasks.on_given
    sessions = Sessions(store)
    installed = Installed(host, weight_formats, *([fleet.shelves] if fleet else []))
    jobs = Jobs(host, fleet, settings, files, pictures, tasks, sessions, installed)
    limit = RateLimit(settings.requests_per_minute)
    routes = Routes(settings, Gate(settings), limit, files, tasks, sessions, jobs, fleet)
    life = _Life(lock, store, files, hooks, tasks, installed, fleet)
    app = web.Application(middlewares=[life.readiness, routes.guard])
    app.add_routes(routes.table())
    app.cleanup_ctx.append(life.run)
    app.on_shutdown.append(life.end_streams)  # the web server waits for open responses
    return app


def create_failed_app(why: str) -> web.Application:
    """What is served where the API cannot be, as with a wrong setting: why, to who is on this machine."""

    async def tell(request: web.Request) -> web.Response:
        told = why if is_local(request) else "its log says why"
        return Problem(503, f"The job API does not run: {told}").response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", tell)
    return app


def _fleet(host: "Host", settings: Settings) -> Fleet | None:
    """The fleet that the settings ask for, if they do.

    Raises:
        RuntimeError: there can be none here.
        Refusal: this machine has no token for the cluster, or one that others can read.
    """
    if settings.stations is None:
        return None
    if reason := cannot_run():
        raise RuntimeError(f"WAN21_STATIONS is set, and {reason}")
    if settings.ray_address is not None and (refusal := cannot_join()):
        raise refusal
    return Fleet(host, settings)


class _Life:
    """Starts and stops the parts; a failure is logged and answered to clients, and the host starts anyway."""

    def __init__(
        self,
        lock: FileLock,
        store: Store,
        files: Files,
        hooks: Webhooks,
        tasks: Tasks,
        installed: Installed,
        fleet: Fleet | None,
    ):
        self._lock = lock
        self._store = store
        self._files = files
        self._hooks = hooks
        self._tasks = tasks
        self._installed = installed
        self._fleet = fleet
        self._failure: str | None = "it has not started yet"

    @web.middleware
    async def readiness(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Answers with 503 while the parts do not run."""
        if self._failure:
            return Problem(503, f"The job API does not run: {self._failure}").response()
        return await handler(request)

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Starts the parts, and stops them when the web server ends."""
        work: list[asyncio.Task[None]] = []
        try:
            await self._store.open()
            await self._files.remove_left_behind()
            if self._fleet is not None:
                self._fleet.start()
            await self._tasks.start()
            await self._hooks.start()
            atexit.register(self._tasks.stop_at_exit)  # ComfyUI ends by Ctrl+C without the clean-up below
            work = [asyncio.create_task(self._clean()), asyncio.create_task(self._look())]
            self._failure = None
        except Exception as error:
            if isinstance(error, DatabaseError):
                self._failure = self._store.explain(error)
            else:
                self._failure = f"{type(error).__name__}: {error}"
            logging.exception("Wan2.1 jobs: the API does not run")
        yield
        atexit.unregister(self._tasks.stop_at_exit)
        for task in work:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        if work:
            await self._hooks.stop()
            await self._tasks.stop()
        if self._fleet is not None:
            await asyncio.to_thread(self._fleet.stop)
        self._store.close()
        self._lock.release()

    async def end_streams(self, _: web.Application) -> None:
        """Ends all streams of snapshots."""
        self._tasks.release()

    async def _clean(self) -> None:
        while True:
            try:
                await self._files.remove_stale()
            except Exception:
                logging.exception("Wan2.1 jobs: old files could not be removed")
            await asyncio.sleep(CLEAN_SECONDS)

    async def _look(self) -> None:
        """Reads the headers of the model files, so that the first run need not wait for them."""
        try:
            await asyncio.to_thread(self._installed.look)
        except Exception:
            logging.exception("Wan2.1 jobs: the model files could not be looked at")
