"""Jobs and stations as they are known to the API, and which job a station is given next."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..graph import Graph
from .about import About, files_in

if TYPE_CHECKING:
    from ...host.queue import Observer


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
        }


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
