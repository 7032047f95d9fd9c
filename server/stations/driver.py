"""The driver's process: keeps stations alive on Ray's machines, and hands jobs and news between them and us.

It decides nothing about jobs. Requests come through a pipe, and news goes back by it, as tuples:

    ("run", number, life, prompt id, graph, names of inputs, folder of outputs), ("cancel", number, prompt id)
    ("ready", number, life, about), ("news", number, life, *`station.News`), ("gone", number, life, why)

A *life* of a station is from an answer of its ComfyUI to its end. When the pipe ends, whoever asked is gone,
and the stations go too.
"""

import asyncio
import contextlib
import itertools
import logging
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import cloudpickle  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayActorError, RayError

from ..waiting import within
from . import station

OBJECT_STORE_BYTES = 512 * 2**20  # of this machine's share: pictures on their way, videos on theirs back
HUNG_SECONDS = 60.0  # without a sign of life, after which a station is killed
AGAIN_SECONDS = 0.2  # between questions to a station that Ray starts again
RETRY_SECONDS = 30.0  # after one whose ComfyUI did not start
FILL_SECONDS = 5.0  # between looks for machines that joined


class Setup(NamedTuple):
    """What a fleet is started with.

    Attributes:
        count: stations; 0 is as many as the machines have room for.
        address: of Ray's cluster; None starts one here, on loopback.
        gpus: of each station; None is 1 where this machine has any, else 0.
        program: as of `station.Station`.
        inputs, outputs: the API's folders.
    """

    count: int
    address: str | None
    gpus: int | None
    program: dict[str, Any]
    inputs: str
    outputs: str


class Driver:
    """All stations.

    Args:
        pipe: to the API's process.
        setup: what was asked for.
        folder: private to this process, for Ray's files.
    """

    def __init__(self, pipe: Connection, setup: Setup, folder: str):
        self.pipe = pipe
        self.setup = setup
        self.stations: list[Any] = []  # handles of actors, by number
        self.lives: list[int] = []  # 0 while a station does not answer
        self.folders: dict[str, str] = {}  # of outputs, by prompt id
        self.background: set[asyncio.Task] = set()
        self._connect(folder)
        found = bool(ray.cluster_resources().get("GPU"))
        self.gpus = setup.gpus if setup.gpus is not None else int(found or setup.address is not None)
        cloudpickle.register_pickle_by_value(station)
        # Spread: two stations without GPUs on one machine only share its cores.
        placed = {"num_cpus": 1, "num_gpus": self.gpus, "scheduling_strategy": "SPREAD"}
        self.kind: Any = ray.remote(max_restarts=-1, **placed)(station.Station)

    def _connect(self, folder: str) -> None:
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        common["logging_level"] = logging.ERROR
        if self.setup.address is not None:
            ray.init(self.setup.address, **common)
            return
        ray.init(
            "local",  # never a cluster that somebody else has started
            num_cpus=max(self.setup.count, 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(Path(folder) / "r"),
            **common,
        )

    async def run(self) -> None:
        """Works until the pipe ends."""
        reading = asyncio.ensure_future(self._read())
        while not reading.done():
            for number in range(len(self.stations), self.setup.count or self._room()):
                self.stations.append(self.kind.remote(self.setup.program | {"gpus": self.gpus}))
                self.lives.append(0)
                self._spawn(self._keep(number))
            await asyncio.wait([reading], timeout=FILL_SECONDS)
        reading.result()

    def _room(self) -> int:
        """Stations that the machines have room for."""
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(int(one.get("GPU", 0)) // self.gpus for one in machines) if self.gpus else len(machines)

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, *args = await loop.run_in_executor(None, self.pipe.recv)
                self._spawn({"run": self._run, "cancel": self._cancel}[name](*args))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)

    def _tell(self, *news: Any) -> None:
        with contextlib.suppress(OSError):  # the API is gone, which `_read` finds out
            self.pipe.send(news)

    # --- stations -------------------------------------------------------------------------------------

    async def _keep(self, number: int) -> None:
        """Follows a station through all of its lives. Where no machine has room for it, it waits for one."""
        for life in itertools.count(1):
            about = await self._first_answer(number)
            self.lives[number] = life
            self._tell("ready", number, life, about)
            why = await self._follow(number, life)
            self.lives[number] = 0
            self._tell("gone", number, life, why)

    async def _first_answer(self, number: int) -> dict[str, Any]:
        """What its ComfyUI says of itself: a station that Ray starts again refuses work until it answers."""
        while True:
            try:
                return await self.stations[number].ready.remote()
            except RayActorError:
                await asyncio.sleep(AGAIN_SECONDS)
            except RayError as error:
                self._tell("gone", number, 0, _reason(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _follow(self, number: int, life: int) -> str:
        """Hands on the news of a station until its end, and gives the reason of that."""
        words = ""
        while True:
            try:
                news = await within(HUNG_SECONDS, self._listen(number))
            except TimeoutError:
                ray.kill(self.stations[number], no_restart=False)
                return f"it gave no sign of life for {HUNG_SECONDS:g} s"
            except RayError as error:
                return words or _reason(error)
            for one in news:
                if one[0] == "dying":
                    words = one[1]
                elif one[0] == "ended":
                    self._tell("news", number, life, "ended", *await asyncio.to_thread(self._ended, *one[1:]))
                else:
                    self._tell("news", number, life, *one)

    async def _listen(self, number: int) -> list[tuple]:
        return await self.stations[number].listen.remote()

    # --- jobs -----------------------------------------------------------------------------------------

    async def _run(
        self, number: int, life: int, prompt_id: str, graph: dict, names: Sequence[str], folder: str
    ) -> None:
        if self.lives[number] != life:
            return  # its end has been told
        self.folders[prompt_id] = folder
        try:
            read = {name: (Path(self.setup.inputs) / name).read_bytes() for name in names}
            await self.stations[number].run.remote(prompt_id, graph, read, folder)
        except RayActorError:
            pass  # `_follow` tells
        except (RayError, OSError) as error:
            self._tell("news", number, life, "ended", prompt_id, _failed(_reason(error)))

    async def _cancel(self, number: int, prompt_id: str) -> None:
        with contextlib.suppress(RayError):  # it is asked again as long as the job is there
            await self.stations[number].cancel.remote(prompt_id)

    def _ended(
        self, prompt_id: str, record: dict[str, Any] | None, files: Mapping[str, bytes]
    ) -> tuple[str, dict[str, Any] | None]:
        """Writes what a job wrote; its id and record, in which it has failed where that is not possible."""
        folder = Path(self.setup.outputs) / self.folders.pop(prompt_id)
        try:
            for name, data in files.items():
                folder.mkdir(parents=True, exist_ok=True)
                (folder / Path(name).name).write_bytes(data)
        except OSError as error:
            record = _failed(f"what it wrote could not be kept: {error}")
        return prompt_id, record


def _failed(why: str) -> dict[str, Any]:
    """The record of a job that failed outside of a node, as the host would write it."""
    return {"outputs": {}, "status": {"messages": [_error(why)]}}


def _error(why: str) -> tuple[str, dict[str, str]]:
    return "execution_error", {"node_type": "", "exception_message": why}


def _reason(error: Exception) -> str:
    """An error of Ray's in one line; of one that a station raised, what it said."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, RayActorError):
        return "its process ended"
    text = str(cause).strip()
    return text.splitlines()[-1] if text else type(cause).__name__


def serve(pipe: Connection) -> None:
    """Keeps stations until the pipe ends. The first request is a `Setup`."""
    with tempfile.TemporaryDirectory(prefix="wan21-", ignore_cleanup_errors=True) as folder:
        try:
            driver = Driver(pipe, Setup(*pipe.recv()), folder)
            asyncio.run(driver.run())
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            ray.shutdown()
