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

from ..wan.files.bad_file import listed
from ..workers import not_taken, unreachable
from .graph import Graph, class_of
from .installed import Shelf
from .problems import Problem
from .settings import Settings
from .stations import roster
from .stations.about import About, files_in, pack_digest
from .stations.link import Link
from .stations.roster import Job, Station, failed, interrupted, loaded_by, next_pair, places

if TYPE_CHECKING:
    from ..host.queue import Complaint, Host, OnMessage

TRIES = 2  # of a job whose station dies
MAX_RECORDS = 256  # of jobs that are over, for the tasks to read
NEW_DRIVER_SECONDS = 5.0  # after one that ended
REFUSED_SECONDS = 30.0  # after one that the cluster did not take
AGAIN_SECONDS = 10.0  # after a job could not be given, such as for a full disk

OnGiven = Callable[[str, str], Awaitable[None]]


class Fleet:
    """The queue of the tasks; its methods are those of `host.queue.Host`, for the event loop.

    Attributes:
        on_given: awaited with a job's prompt id and the name of its station before the station has it.
        stations: by number.

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
        self.trouble = ""  # why there is no station at all; empty where there may be
        self.had_one = False  # since this process began
        self.stations: dict[int, Station] = {}

    # --- life -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the driver, which starts the stations; on a cluster, as soon as that can be reached."""
        if self._settings.ray_address is None:
            self._start()
        else:
            self._spawn(self._start_in(self._settings.ray_address))

    async def _start_in(self, address: str) -> None:
        refusal = await asyncio.to_thread(unreachable, address)
        if self._stopping:
            return
        if refusal is None:
            return self._start()
        self._have_none(f"{refusal.problem}. {refusal.fix}")
        asyncio.get_running_loop().call_later(REFUSED_SECONDS, self.start)

    def _start(self) -> None:
        main, args = self._host.program()
        program = {"main": main, "args": args, "env": self._settings.of_stations()}
        setup = (
            self._settings.stations,
            self._settings.ray_address,
            self._settings.gpus_per_job,
            program,
            str(self._host.input_directory),
            str(self._host.output_directory),
            self._settings.hung_seconds,
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
        seconds = REFUSED_SECONDS if self.trouble else NEW_DRIVER_SECONDS
        for number in self.stations:
            self._gone(number, 0, f"the driver ended: {words}")
        if self._link is not None:
            self._link.close()
        if not self.trouble:
            address = self._settings.ray_address
            where = f" at WAN21_RAY_ADDRESS={address}" if address else ""
            self._have_none(f"the driver of Ray{where} ended ({words}), and another is started")
        asyncio.get_running_loop().call_later(seconds, self.start)

    def _have_none(self, why: str) -> None:
        """Notes why there are no stations, and says so in the log and to what waits; empty: there may be."""
        if why and why != self.trouble:
            logging.warning("Wan2.1 jobs: there are no stations: %s", why)
            for job in self._waiting.values():
                self._tell(job, f"there are no stations: {why}")
        self.trouble = why

    def _have_one(self, station: Station, is_there: bool) -> None:
        """Notes that a station is there; or, where none was so far, why not."""
        self.had_one |= is_there
        if is_there or not self.had_one:
            name = station.name or f"number {station.number + 1}"
            self._have_none("" if is_there else f"station {name}: {station.why}")

    def _tell(self, job: Job, why: str) -> None:
        self._on_message("told", {"prompt_id": job.prompt_id, "why": why})

    def check_there(self) -> None:
        """Checks that there may be stations.

        Raises:
            Problem: 503, with the reason, where none has ever answered and none can.
        """
        if self.trouble and not self.had_one:
            wait = {"Retry-After": f"{REFUSED_SECONDS:g}"}
            raise Problem(503, f"There are no stations: {self.trouble}", headers=wait)

    # --- the queue ------------------------------------------------------------------------------------

    def observe(self, on_message: "OnMessage") -> None:
        """Lets `on_message(type, data)` be called for each message of a job.

        Beside those of the host there are "requeued", the job waits again, and "told", each with a `why`.
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
        self.check_there()
        return roster.chosen(infra, workers, self.stations.values())

    def lacking(self, graph: Graph, placement: Sequence[str]) -> list[tuple[str, str, str]]:
        """Complaints, as of `check`, on files that no station has that may run a graph."""
        return roster.lacking(graph, [one for one in self.stations.values() if one.is_chosen(placement)])

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
        job = self._waiting[prompt_id] = Job(prompt_id, graph, created_at, owner, stations, tries)
        if self.trouble:
            self._tell(job, f"there are no stations: {self.trouble}")
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
        if self.stations:
            self._tell_who_cannot_run()

    def _tell_who_cannot_run(self) -> None:
        """Says once of a job that none of the stations can run it; it waits for one that can."""
        for job in self._waiting.values():
            if not job.told and not any(one.life and one.can_run(job) for one in self.stations.values()):
                job.told = True
                which = f" of {', '.join(sorted(job.placement))}" if job.placement else ""
                self._tell(job, f"no station{which} that has its files answers now; it waits for one")

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
        for sentence in station.differing(job.graph):
            self._tell(job, sentence)
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
            elif kind == "none":
                self._have_none(*news)
            elif kind == "refused" and (address := self._settings.ray_address):
                refusal = not_taken(address, *news)
                self._have_none(f"{refusal.problem}. {refusal.fix}")
            elif number in self.stations and self.stations[number].life == life:
                self._take(self.stations[number], *news)
        except Exception:
            logging.exception("Wan2.1 jobs: news %s of a station was not understood", kind)

    def _ready(self, number: int, life: int, about: dict[str, Any]) -> None:
        station = self._station(number)
        station.named(about["machine"], {other.name for other in self.stations.values()})
        station.loaded, told = frozenset(), About.of(about)
        self._know(station, told)
        if told.pack != pack_digest():
            station.why = "its ComfyUI has another version of the Wan2.1 pack than the API's; update it"
            logging.warning("Wan2.1 jobs: station %s gets no jobs: %s", station.name, station.why)
            return self._have_one(station, False)
        station.life, station.why = life, ""
        self._have_one(station, True)
        logging.info("Wan2.1 jobs: station %s is ready", station.name)
        self._give()

    def _know(self, station: Station, about: About) -> None:
        """Notes what a station says of itself, and which of its files are others elsewhere."""
        station.about, known = about, set(station.differing())
        roster.compare(self.stations.values())
        for sentence in station.differing():
            if sentence not in known:
                logging.warning("Wan2.1 jobs: %s; put one file on all machines", sentence)

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
        self._have_one(station, False)
        job, station.job = station.job, None
        if job is None:
            return
        station.lost += 1
        del self._running[job.prompt_id]
        if job.cancelled:
            self._end(station, job, interrupted())
        elif job.tries < TRIES:
            self._queue_again(job, f"station {name} died while it ran it ({why}); it is queued once more")
        else:
            told = f"station {name} died while it ran it ({why}), the second one; it is not tried again"
            self._end(station, job, failed("", told))

    def _take(self, station: Station, kind: str, *news: Any) -> None:
        if kind == "json":
            station.observer.hear(json.loads(news[0]))
        elif kind == "bytes":
            station.observer.hear_bytes(news[0])
        elif kind == "about":
            self._know(station, About.of(news[0]))
            self._give()
        elif kind == "ended" and station.job is not None and station.job.prompt_id == news[0]:
            if news[1] is not None and "refused" in news[1]:
                self._refused(station, station.job, self._host.complaints(*news[1]["refused"]))
            else:
                self._over(station, news[1])

    def _refused(self, station: Station, job: Job, found: "Sequence[Complaint]") -> None:
        """A station did not take a job: one that lost a file of it lets another try, where one has it."""
        gone = station.lose({(one.node_id, one.input) for one in found}, job.graph)
        others = [one for one in self.stations.values() if one.life and one.can_run(job)]
        if not gone or not others or job.tries >= TRIES:
            return self._over(station, failed(class_of(job.graph, found[0].node_id), found[0].message))
        station.job = None
        del self._running[job.prompt_id]
        why = f"station {station.name} has {listed(map(repr, gone))} no more; it is queued once more"
        self._queue_again(job, why)

    def _queue_again(self, job: Job, why: str) -> None:
        self._waiting[job.prompt_id] = job
        self._on_message("requeued", {"prompt_id": job.prompt_id, "why": why})
        self._give()

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
