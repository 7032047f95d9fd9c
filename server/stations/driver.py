"""The driver's process: keeps stations alive on Ray's machines, and hands jobs and news between them and us.

It decides nothing about jobs. Requests come through a pipe, and news goes back by it, as tuples:

    ("run", number, life, prompt id, graph, names of inputs, folder of outputs), ("cancel", number, prompt id)
    ("ready", number, life, about), ("news", number, life, *`station.News`), ("gone", number, life, why),
    ("none", 0, 0, why there is no station at all), ("refused", 0, 0, why the cluster does not take us)

A *life* of a station is from an answer of its ComfyUI to its end. When the pipe ends, whoever asked is gone,
and the stations go too.
"""

import asyncio
import contextlib
import logging
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import cloudpickle  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ..waiting import within
from . import station

OBJECT_STORE_BYTES = 512 * 2**20  # of this machine's share: pictures on their way, videos on theirs back
AGAIN_SECONDS = 0.2  # between questions to a station that Ray starts again
RETRY_SECONDS = 30.0  # after one whose ComfyUI did not start
ROOM_SECONDS = 30.0  # for Ray to start a process, after which it is told what a station needs
FILL_SECONDS = 5.0  # between looks for machines that joined


class Setup(NamedTuple):
    """What a fleet is started with.

    Attributes:
        count: stations; 0 is as many as the machines have room for.
        address: of Ray's cluster; None starts one here, on loopback.
        gpus: of each station; None is 1 where this machine has any, else 0.
        program: as of `station.Station`.
        inputs, outputs: the API's folders.
        hung_seconds: without a sign of life, after which a station is killed.
    """

    count: int
    address: str | None
    gpus: int | None
    program: dict[str, Any]
    inputs: str
    outputs: str
    hung_seconds: float


@dataclass(eq=False)
class Place:
    """What is kept of a station.

    Attributes:
        number: its own, and that of one that comes after it on another machine.
        actor: its handle.
        machine: Ray's name of the only machine that it may be on; None leaves it to Ray.
        lives: that have begun.
        life: 0 while it does not answer.
        keeping: what follows it; None where its machine has left.
    """

    number: int
    actor: Any = None
    machine: str | None = None
    lives: int = 0
    life: int = 0
    keeping: asyncio.Task[None] | None = None


class Refused(Exception):
    """Why a cluster does not take us."""


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
        self.places: list[Place] = []  # by number
        self.has_told = False  # that there is no station at all
        self.folders: dict[str, str] = {}  # of outputs, by prompt id
        self.background: set[asyncio.Task] = set()
        self._connect(folder)
        self._tell("none", 0, 0, "")  # nothing is known against it any more
        found = bool(ray.cluster_resources().get("GPU"))
        self.gpus = setup.gpus if setup.gpus is not None else int(found or setup.address is not None)
        self.cpus = int(not self.gpus)  # of those on GPUs, these alone say how many a machine has room for
        cloudpickle.register_pickle_by_value(station)
        remote: Any = ray.remote  # its stubs take every option for one of another type
        self.kind = remote(max_restarts=-1, num_cpus=self.cpus, num_gpus=self.gpus)(station.Station)

    def _connect(self, folder: str) -> None:
        common: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
        common["logging_level"] = logging.ERROR
        if self.setup.address is not None:
            try:
                ray.init(self.setup.address, **common)
            except Exception as error:  # of many classes, from wrong tokens to wrong versions
                raise Refused(str(error).strip().partition("\n")[0].rstrip(".")) from error
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
            self._fill()
            await asyncio.wait([reading], timeout=FILL_SECONDS)
        reading.result()

    def _fill(self) -> None:
        """Starts the stations that are missing, and gives up those whose machines have left."""
        if self.setup.count:
            for _ in range(len(self.places), self.setup.count):
                self._begin(None)
            return
        machines = {node["NodeID"]: self._room(node["Resources"]) for node in ray.nodes() if node["Alive"]}
        for place in self.places:
            if place.keeping is not None and place.machine not in machines:
                self._give_up(place)
        have = Counter(place.machine for place in self.places if place.keeping is not None)
        for machine, room in machines.items():
            for _ in range(have[machine], room):
                self._begin(machine)
        if not self.places and not self.has_told:
            self.has_told = True
            why = f"no machine of the cluster has what a station needs: {self._needs()}"
            why += " (WAN21_GPUS_PER_JOB=0 is for stations on the CPU)" if self.gpus else ""
            self._tell("none", 0, 0, why)

    def _room(self, resources: Mapping[str, float]) -> int:
        """Stations that a machine has room for; without GPUs one, since two would only share its cores."""
        if self.gpus:
            return int(resources.get("GPU", 0)) // self.gpus
        return int(resources.get("CPU", 0) >= self.cpus)

    def _needs(self) -> str:
        return f"{self.gpus} GPU{'s' * (self.gpus > 1)}" if self.gpus else "a CPU core"

    def _begin(self, machine: str | None) -> None:
        """Starts a station on a machine, or wherever Ray finds the most room."""
        place = next((one for one in self.places if one.keeping is None), None)
        if place is None:
            place = Place(len(self.places))
            self.places.append(place)
        where = "SPREAD" if machine is None else NodeAffinitySchedulingStrategy(machine, soft=False)
        machines = sum(node["Alive"] for node in ray.nodes())
        sharing = 0 if self.gpus else -(-self.setup.count // machines)  # `count` spreads over the machines
        program = self.setup.program | {
            "gpus": self.gpus,
            "hung": self.setup.hung_seconds,
            "sharing": sharing,
        }
        place.actor = self.kind.options(scheduling_strategy=where).remote(program)
        place.machine = machine
        place.keeping = self._spawn(self._keep(place))

    def _give_up(self, place: Place) -> None:
        assert place.keeping is not None
        place.keeping.cancel()
        place.keeping, place.life = None, 0
        self._tell("gone", place.number, place.lives, "its machine has left the cluster")

    async def _read(self) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, *args = await loop.run_in_executor(None, self.pipe.recv)
                self._spawn({"run": self._run, "cancel": self._cancel}[name](*args))

    def _spawn(self, work: Any) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self.background.add(task)
        task.add_done_callback(self.background.discard)
        return task

    def _tell(self, *news: Any) -> None:
        with contextlib.suppress(OSError):  # the API is gone, which `_read` finds out
            self.pipe.send(news)

    # --- stations -------------------------------------------------------------------------------------

    async def _keep(self, place: Place) -> None:
        """Follows a station through all of its lives. Where no machine has room for it, it waits for one."""
        while True:
            about = await self._first_answer(place)
            place.lives += 1
            place.life = place.lives
            self._tell("ready", place.number, place.life, about)
            why = await self._follow(place)
            place.life = 0
            self._tell("gone", place.number, place.lives, why)

    async def _first_answer(self, place: Place) -> dict[str, Any]:
        """What its ComfyUI says of itself: a station that Ray starts again refuses work until it answers."""
        while True:
            try:
                await self._wait_for_room(place)
                return await place.actor.ready.remote()
            except RayActorError:
                await asyncio.sleep(AGAIN_SECONDS)
            except RayError as error:
                self._tell("gone", place.number, 0, _reason(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def _wait_for_room(self, place: Place) -> None:
        async def here() -> None:
            await place.actor.here.remote()

        try:
            return await within(ROOM_SECONDS, here())
        except TimeoutError:
            free = {"GPU": 0.0, "CPU": 0.0} | ray.available_resources()
            why = f"it waits for room: it needs {self._needs()} of one machine, and free in the cluster are "
            why += f"{free['GPU']:g} GPUs and {free['CPU']:g} CPU cores"
            self._tell("gone", place.number, 0, why)
        await here()

    async def _follow(self, place: Place) -> str:
        """Hands on the news of a station until its end, and gives the reason of that."""
        words, hung = "", self.setup.hung_seconds
        while True:
            try:
                news = await within(hung, self._listen(place))
            except TimeoutError:
                ray.kill(place.actor, no_restart=False)
                return f"it gave no sign of life for {hung:g} s"
            except RayError as error:
                return words or _reason(error)
            for one in news:
                if one[0] == "dying":
                    words = one[1]
                elif one[0] == "ended":
                    ended = await asyncio.to_thread(self._ended, *one[1:])
                    self._tell("news", place.number, place.life, "ended", *ended)
                else:
                    self._tell("news", place.number, place.life, *one)

    async def _listen(self, place: Place) -> list[tuple]:
        return await place.actor.listen.remote()

    # --- jobs -----------------------------------------------------------------------------------------

    async def _run(
        self, number: int, life: int, prompt_id: str, graph: dict, names: Sequence[str], folder: str
    ) -> None:
        if self.places[number].life != life:
            return  # its end has been told
        self.folders[prompt_id] = folder
        try:
            read = {name: (Path(self.setup.inputs) / name).read_bytes() for name in names}
            await self.places[number].actor.run.remote(prompt_id, graph, read, folder)
        except RayActorError:
            pass  # `_follow` tells
        except (RayError, OSError) as error:
            self._tell("news", number, life, "ended", prompt_id, _failed(_reason(error)))

    async def _cancel(self, number: int, prompt_id: str) -> None:
        with contextlib.suppress(RayError):  # it is asked again as long as the job is there
            await self.places[number].actor.cancel.remote(prompt_id)

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
        except Refused as refused:
            with contextlib.suppress(OSError):
                pipe.send(("refused", 0, 0, str(refused)))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            ray.shutdown()
