"""Jobs and stations as they are known to the API, and which job a station is given next."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...wan.files.bad_file import listed
from ..graph import Graph
from ..problems import Problem
from .about import About, files_in

if TYPE_CHECKING:
    from ...host.queue import Observer

RETRY_SECONDS = 10.0  # for a station to answer


@dataclass(eq=False)
class Job:
    """A job that waits or runs.

    Attributes:
        owner: keys take turns.
        placement: stations that may run it, by their names or those of their machines; empty is any.
        tries: times that it was given to a station.
        cancelled: whether its end is wanted.
        told: whether it was said that no station can run it now.
    """

    prompt_id: str
    graph: Graph
    created_at: float
    owner: str
    placement: Collection[str]
    tries: int
    cancelled: bool = False
    told: bool = False


@dataclass(eq=False)
class Station:
    """A station.

    Attributes:
        number, life: as of `driver`; life is 0 while it gets no jobs.
        name: its machine's and a number.
        about: what its ComfyUI said of itself when it last answered.
        why: it gets no jobs.
        job: that it runs.
        loaded: files of its last job.
        done, lost: jobs.
        others: names of other stations that have another file under the same name, by the node's class and
            that name; see `compare`.
    """

    number: int
    observer: "Observer"
    life: int = 0
    name: str = ""
    machine: str = ""
    about: About | None = None
    why: str = "it has not answered yet"
    job: Job | None = None
    loaded: frozenset[tuple[str, str]] = frozenset()
    done: int = 0
    lost: int = 0
    others: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)

    def is_chosen(self, placement: Collection[str]) -> bool:
        """Whether a request's choice of stations allows this one."""
        return not placement or self.name in placement or self.machine in placement

    def can_run(self, job: Job) -> bool:
        """Whether it may run a job and has its files."""
        return self.is_chosen(job.placement) and self.about is not None and not self.about.lacks(job.graph)

    def named(self, machine: str, taken: Collection[str]) -> None:
        """Gives it a name on its machine; it keeps the one that it has there."""
        if self.machine != machine:
            names = (f"{machine}-{i}" for i in range(1, len(taken) + 2))
            self.machine, self.name = machine, next(name for name in names if name not in taken)

    def lose(self, places: Collection[tuple[str, str]], graph: Graph) -> list[str]:
        """Notes that files are not there, until it says again what is. Gives their names.

        Args:
            places: (node, input) in the graph that name them; others are passed over.
        """
        gone = [named for named in files_in(graph) if (named.node_id, named.input) in places]
        if self.about is not None:
            lists = {kind: [*files] for kind, files in self.about.lists.items()}
            for named in gone:
                lists[named.node_class] = [one for one in lists[named.node_class] if one != named.file]
            self.about = self.about._replace(lists=lists)
        return [named.file for named in gone]

    def differing(self, graph: Graph | None = None) -> list[str]:
        """Sentences on files, of a graph or all, that are others than on other stations."""
        used = None if graph is None else loaded_by(graph)
        return [
            f"{file!r} ({kind}) is another file on {self.name} than on {listed(names)}: size, beginning or "
            "end differ"
            for (kind, file), names in self.others.items()
            if used is None or (kind, file) in used
        ]

    def described(self) -> dict[str, Any]:
        """It as the operator sees it."""
        state = "running" if self.job else "idle" if self.life else "away"
        return {
            "name": self.name or f"number {self.number + 1}",
            "machine": self.machine,
            "device": self.about.device if self.about else "",
            "state": state,
            "why": self.why,
            "task": f"task_{self.job.prompt_id.replace('-', '')}" if self.job else None,
            "jobs_done": self.done,
            "jobs_lost": self.lost,
            "differing_files": self.differing(),
        }


def chosen(infra: Any, workers: Any, stations: Collection[Station]) -> list[str]:
    """The stations, or machines, that a request chooses; none is any.

    Args:
        infra, workers: of the request; one may be given as None.

    Raises:
        Problem: 422 for what there is not, 503 where no station has answered yet.
    """
    if infra not in (None, "", "private", "private_first"):
        raise _wrong("infra", "jobs run on this server's own stations; leave it out, or say private")
    if not workers:
        return []
    if not isinstance(workers, list) or not all(isinstance(name, str) for name in workers):
        raise _wrong("workers", "must be a list of names of stations")
    known = {name for one in stations if one.name for name in (one.name, one.machine)}
    if not known:
        raise Problem(503, "No station has answered yet.", headers={"Retry-After": f"{RETRY_SECONDS:g}"})
    if unknown := [name for name in workers if name not in known]:
        raise _wrong("workers", f"there is no {unknown[0][:100]!r}; there are {', '.join(sorted(known))}")
    return workers


def lacking(graph: Graph, stations: Collection[Station]) -> list[tuple[str, str, str]]:
    """(node, input, sentence) of files that no station has; none while none of these has ever answered."""
    lacks = [(one.about.lacks(graph), one.name) for one in stations if one.about is not None]
    if not lacks:
        return []
    least, name = min(lacks, key=lambda one: len(one[0]))
    told = "no station that may run it has {!r}; " + f"{name} lacks least"
    return [(named.node_id, named.input, told.format(named.file)) for named in least]


def _wrong(path: str, message: str) -> Problem:
    return Problem(422, f"{path}: {message}", [{"path": path, "message": message}])


def compare(stations: Collection[Station]) -> None:
    """Finds files of one name that are not one file, and notes them on each station."""
    prints = {one.name: one.about.prints for one in stations if one.about is not None}
    for station in stations:
        others: dict[tuple[str, str], list[str]] = {}
        for name, theirs in prints.items():
            for key, its in prints.get(station.name, {}).items():
                if theirs.get(key, its) != its:
                    others.setdefault(key, []).append(name)
        station.others = others


def loaded_by(graph: Graph) -> frozenset[tuple[str, str]]:
    """The model files that a station has loaded after a graph has run, by the node's class."""
    return frozenset((named.node_class, named.file) for named in files_in(graph))


def next_pair(
    waiting: Collection[Job], stations: Collection[Station], served: Mapping[str, int]
) -> tuple[Job, Station] | None:
    """The next job and the station for it: one that has its files loaded, where there is one.

    The key that has the fewest jobs running comes first, then the one whose last turn is longest ago; of one
    key the oldest job comes first. A job for which no station is free holds up no other.

    Args:
        served: when each key had its last turn, as a number that rises.
    """
    free = [one for one in stations if one.life and one.job is None]
    if not free or not waiting:
        return None
    running = Counter(one.job.owner for one in stations if one.job)
    for job in sorted(waiting, key=lambda j: (running[j.owner], served.get(j.owner, 0), j.created_at)):
        able = [one for one in free if one.can_run(job)]
        if able:
            return job, max(able, key=lambda one: one.loaded == loaded_by(job.graph))
    return None


def places(graph: Graph) -> tuple[list[str], str]:
    """The pictures that a graph reads, in the input folder, and the folder of what it saves."""
    names = [node["inputs"]["image"] for node in graph.values() if node["class_type"] == "LoadImage"]
    [saved] = {
        node["inputs"]["filename_prefix"].rpartition("/")[0]
        for node in graph.values()
        if "filename_prefix" in node["inputs"]
    }
    return names, saved


def failed(node_class: str, why: str) -> dict[str, Any]:
    """The record of a job that failed, as the host's history has it."""
    error = {"node_type": node_class, "exception_message": why}
    return {"outputs": {}, "status": {"messages": [("execution_error", error)]}}


def interrupted() -> dict[str, Any]:
    """The record of a job that was cancelled."""
    return {"outputs": {}, "status": {"messages": [("execution_interrupted", {})]}}
