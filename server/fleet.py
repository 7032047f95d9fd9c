"""A fleet: many ComfyUIs, the stations, in the place of the one whose queue the tasks otherwise use.

Order and states are the tasks', in SQLite. What waits is known here as well, and each station that is free
is given the next job that it can run: keys take turns, and of one key the oldest job comes first. Which
stations there are, `stations.driver` says, in a process of its own.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .graph import Graph, class_of
from .installed import Shelf
from .problems import Problem
from .settings import Settings
from .stations.about import About, files_in, pack_digest
from .stations.link import Link
from .stations.roster import Job, Station, failed, interrupted, loaded_by, next_pair, places

if TYPE_CHECKING:
    from ..host.queue import Complaint, Host, OnMessage

TRIES = 2  # of a job whose station dies
MAX_RECORDS = 256  # of jobs that are over, for the tasks to read
NEW_DRIVER_SECONDS = 5.0  # after one that ended
AGAIN_SECONDS = 10.0  # after a job could not be given, such as for a full disk

OnGiven = Callable[[str, str], Awaitable[None]]


class Fleet:
    """The queue of the tasks; its methods are those of `host.queue.Host`, for the event loop.

    Attributes:
        on_given: awaited with a job's prompt id and the name of its station before the station has it.

    Args:
        host: the ComfyUI whose web server the API is on.
        settings: of the API.
    """

    def __init__(self, host: "Host", settings: Settings):
        self._host = host
        self._settings = settings
        self._link: Link | None = None
        self._stopping = False
        self._waiting: dict[str, Job] = {}
        self._running: dict[str, Station] = {}  # by prompt id
        self._records: dict[str, dict[str, Any] | None] = {}
        self._served: dict[str, int] = {}  # when a key had its last turn
        self._background: set[asyncio.Task[None]] = set()
        self._on_message: OnMessage = lambda kind, data: None
        self.on_given: OnGiven | None = None
        self.stations: dict[int, Station] = {}

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the driver, which starts the stations."""
        main, args = self._host.program()
        program = {"main": main, "args": args, "env": self._settings.of_stations()}
        setup = (
            self._settings.stations,
            self._settings.ray_address,
            self._settings.gpus_per_job,
            program,
            str(self._host.input_directory),
            str(self._host.output_directory),
        )
        self._link = Link(setup, self._on_news, self._on_end)

    def stop(self) -> None:
        """Ends driver and stations. Blocking."""
        self._stopping = True
        if self._link is not None:
            self._link.close()

    def stop_running(self, seconds: float) -> None:
        """As the host's, for the process's end: the stations go with it. Blocking."""
        self._host.stop_running(seconds)
        self.stop()

    def _on_end(self, words: str) -> None:
        """The driver has ended, and with it the stations."""
        if self._stopping:
            return
        logging.warning("Wan2.1 jobs: the driver of the stations ended (%s); another is started", words)
        for number in self.stations:
            self._gone(number, 0, f"the driver ended: {words}")
        if self._link is not None:
            self._link.close()
        asyncio.get_running_loop().call_later(NEW_DRIVER_SECONDS, self.start)

    # --- the queue ------------------------------------------------------------------------------------

    def observe(self, on_message: "OnMessage") -> None:
        """Lets `on_message(type, data)` be called for each message of a job.

        Beside those of the host there are "requeued", the job waits again, and "waits", each with a `why`.
        """
        self._on_message = on_message

    async def check(self, prompt_id: str, graph: Graph) -> "tuple[list[str], list[Complaint]]":
        """As the host's; a model file that it lacks may be on a station."""
        outputs, complaints = await self._host.check(prompt_id, graph)
        known = [station.about for station in self.stations.values() if station.about]
        elsewhere = {
            (named.node_id, named.input)
            for named in files_in(graph)
            if any(about.has(named) for about in known)
        }
        return outputs, [one for one in complaints if (one.node_id, one.input) not in elsewhere]

    def shelves(self) -> list[Shelf]:
        """The model files of each station that has answered since this process began."""
        return [station.about.shelf for station in self.stations.values() if station.about]

    def placement(self, infra: Any, workers: Any) -> list[str]:
        """The stations, or machines, that a request chooses; none is any.

        Args:
            infra, workers: of the request; one may be given as None.

        Raises:
            Problem: 422 for what there is not, 503 where no station has answered yet.
        """
        if infra not in (None, "", "private"):
            raise _wrong("infra", "jobs run on this server's own stations; leave it out, or say private")
        if not workers:
            return []
        if not isinstance(workers, list) or not all(isinstance(name, str) for name in workers):
            raise _wrong("workers", "must be a list of names of stations")
        known = {name for one in self.stations.values() if one.name for name in (one.name, one.machine)}
        if not known:
            raise Problem(503, "No station has answered yet.", headers={"Retry-After": f"{AGAIN_SECONDS:g}"})
        if unknown := [name for name in workers if name not in known]:
            raise _wrong("workers", f"there is no {unknown[0][:100]!r}; there are {', '.join(sorted(known))}")
        return workers

    def lacking(self, graph: Graph, placement: Sequence[str]) -> list[tuple[str, str, str]]:
        """Complaints, as of `check`, on files that no station has that may run a graph.

        There are none while no station is known.
        """
        may = [(one.about, one.name) for one in self.stations.values() if one.is_chosen(placement)]
        lacks = [(about.lacks(graph), name) for about, name in may if about is not None]
        if not lacks:
            return []
        least, name = min(lacks, key=lambda one: len(one[0]))
        told = "no station that may run it has {!r}; " + f"{name} lacks least"
        return [(named.node_id, named.input, told.format(named.file)) for named in least]

    def put(
        self,
        prompt_id: str,
        graph: Graph,
        outputs: list[str],
        created_at: float,
        owner: str = "",
        stations: Sequence[str] = (),
        tries: int = 0,
    ) -> None:
        """Queues a checked graph.

        Args:
            outputs: not used; a station finds its own.
            created_at: in seconds since 1970.
            owner, stations, tries: see `roster.Job`; `stations` is its placement.
        """
        self._waiting[prompt_id] = Job(prompt_id, graph, created_at, owner, stations, tries)
        self._give()

    def cancel(self, prompt_id: str) -> Literal["removed", "interrupted", "absent"]:
        """Takes a job off the queue, or interrupts it; which of them it was."""
        if self._waiting.pop(prompt_id, None):
            return "removed"
        station = self._running.get(prompt_id)
        if station is None or station.job is None:
            return "absent"
        station.job.cancelled = True
        if self._link is not None:
            self._link.send("cancel", station.number, prompt_id)
        return "interrupted"

    def known(self) -> set[str]:
        """The ids of all jobs that wait or run."""
        return {*self._waiting, *self._running}

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """As the host's."""
        return self._records.get(prompt_id)

    def forget(self, prompt_id: str) -> None:
        """Removes a job's record."""
        self._records.pop(prompt_id, None)

    # --- giving ---------------------------------------------------------------------------------------

    def _give(self) -> None:
        """Gives jobs to stations as long as there is a station that can run one."""
        while pair := next_pair(self._waiting.values(), self.stations.values(), self._served):
            job, station = pair
            del self._waiting[job.prompt_id]
            self._running[job.prompt_id] = station
            station.job = job
            self._served[job.owner] = 1 + max(self._served.values(), default=0)
            self._spawn(self._send(job, station))
        if any(station.life for station in self.stations.values()):
            self._tell_who_cannot_run()

    def _tell_who_cannot_run(self) -> None:
        """Says once of a job that none of the stations can run it; it waits for one that can."""
        for job in self._waiting.values():
            if not job.told and not any(one.life and one.can_run(job) for one in self.stations.values()):
                job.told = True
                which = f" of {', '.join(sorted(job.placement))}" if job.placement else ""
                why = f"no station{which} that has its files answers now; it waits for one"
                self._on_message("waits", {"prompt_id": job.prompt_id, "why": why})

    async def _send(self, job: Job, station: Station) -> None:
        job.tries += 1
        try:
            if self.on_given is not None:
                await self.on_given(job.prompt_id, station.name)
        except Exception:
            logging.exception("Wan2.1 jobs: %s could not be given to a station", job.prompt_id)
            job.tries -= 1
            if station.job is job:
                station.job = None
                del self._running[job.prompt_id]
                self._waiting[job.prompt_id] = job
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._give)
            return
        if station.job is not job:
            return  # the station died meanwhile
        if job.cancelled or self._link is None:
            return self._over(station, interrupted())
        station.loaded = loaded_by(job.graph)
        names, folder = places(job.graph)
        self._link.send("run", station.number, station.life, job.prompt_id, job.graph, names, folder)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    # --- from the driver ------------------------------------------------------------------------------

    def _on_news(self, kind: str, number: int, life: int, *news: Any) -> None:
        try:
            if kind == "ready":
                self._ready(number, life, *news)
            elif kind == "gone":
                self._gone(number, life, *news)
            elif number in self.stations and self.stations[number].life == life:
                self._take(self.stations[number], *news)
        except Exception:
            logging.exception("Wan2.1 jobs: news %s of a station was not understood", kind)

    def _ready(self, number: int, life: int, about: dict[str, Any]) -> None:
        station = self._station(number)
        station.named(about["machine"], {other.name for other in self.stations.values()})
        station.about, station.loaded = About.of(about), frozenset()
        if station.about.pack != pack_digest():
            station.why = "its ComfyUI has another version of the Wan2.1 pack than the API's; update it"
            logging.warning("Wan2.1 jobs: station %s gets no jobs: %s", station.name, station.why)
            return
        station.life, station.why = life, ""
        logging.info("Wan2.1 jobs: station %s is ready", station.name)
        self._give()

    def _station(self, number: int) -> Station:
        if number not in self.stations:
            self.stations[number] = Station(number, self._host.observer(self._hand_on))
        return self.stations[number]

    def _hand_on(self, kind: str, data: dict[str, Any]) -> None:
        self._on_message(kind, data)

    def _gone(self, number: int, life: int, why: str) -> None:
        station = self._station(number)
        station.life, station.why = 0, why
        name = station.name or f"number {number + 1}"
        logging.warning("Wan2.1 jobs: station %s is gone: %s", name, why)
        job, station.job = station.job, None
        if job is None:
            return
        station.lost += 1
        del self._running[job.prompt_id]
        if job.cancelled:
            self._end(station, job, interrupted())
        elif job.tries < TRIES:
            self._waiting[job.prompt_id] = job
            told = f"station {name} died while it ran it ({why}); it is queued once more"
            self._on_message("requeued", {"prompt_id": job.prompt_id, "why": told})
            self._give()
        else:
            told = f"station {name} died while it ran it ({why}), the second one; it is not tried again"
            self._end(station, job, failed("", told))

    def _take(self, station: Station, kind: str, *news: Any) -> None:
        if kind == "json":
            station.observer.hear(json.loads(news[0]))
        elif kind == "bytes":
            station.observer.hear_bytes(news[0])
        elif kind == "about":
            station.about = About.of(news[0] | {"machine": station.machine})
            self._give()
        elif kind == "ended" and station.job is not None and station.job.prompt_id == news[0]:
            self._over(station, self._record(station.job, news[1]))

    def _record(self, job: Job, record: dict[str, Any] | None) -> dict[str, Any] | None:
        """A record as the host's history has it, of a graph that a station refused as well."""
        if record is None or "refused" not in record:
            return record
        node_id, _, text = self._host.complaints(*record["refused"])[0]
        return failed(class_of(job.graph, node_id), text)

    def _over(self, station: Station, record: dict[str, Any] | None) -> None:
        """Ends the job of a station, which is free then."""
        job, station.job = station.job, None
        if job is None:
            return
        station.done += 1
        self._running.pop(job.prompt_id, None)
        self._end(station, job, record)
        self._give()

    def _end(self, station: Station, job: Job, record: dict[str, Any] | None) -> None:
        self._records[job.prompt_id] = record
        while len(self._records) > MAX_RECORDS:
            del self._records[next(iter(self._records))]
        station.observer.hear({"type": "executing", "data": {"node": None, "prompt_id": job.prompt_id}})


def _wrong(path: str, message: str) -> Problem:
    return Problem(422, f"{path}: {message}", [{"path": path, "message": message}])
