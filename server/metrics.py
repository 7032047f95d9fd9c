"""Figures of the queue and of stations in Prometheus' text format, by its own client library.

They are counted in plain numbers, so that the library is needed by who asks for them alone.
"""

import bisect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import states
from .problems import Problem

if TYPE_CHECKING:
    from .fleet import Fleet
    from .tasks import Tasks

BOUNDS = (1.0, 5.0, 15.0, 60.0, 180.0, 600.0, 1800.0, 3600.0)  # seconds of a job
NAMES = {states.COMPLETED: "completed", states.FAILED: "failed", states.CANCELLED: "cancelled"}
HERE = "this ComfyUI"  # the station where there is no fleet


class Tally:
    """Tasks that ended since the process began, by the station that had them last.

    Attributes:
        ended: number by (station, state).
        seconds: of each station, of the tasks that it completed: their number up to each bound and above
            all, and their sum.
    """

    def __init__(self) -> None:
        self.ended: defaultdict[tuple[str, str], int] = defaultdict(int)
        self.seconds: defaultdict[str, tuple[list[int], list[float]]] = defaultdict(
            lambda: ([0] * (len(BOUNDS) + 1), [0.0])
        )

    def add(self, station: str, status: int, seconds: float | None) -> None:
        """Counts a task.

        Args:
            seconds: from its start to its end; None for one that never began.
        """
        self.ended[station or HERE, NAMES[status]] += 1
        if status == states.COMPLETED and seconds is not None:
            counts, total = self.seconds[station or HERE]
            counts[bisect.bisect_left(BOUNDS, seconds)] += 1
            total[0] += seconds


def exposition(tasks: "Tasks", fleet: "Fleet | None") -> tuple[bytes, str]:
    """The figures as text, and its content type.

    Raises:
        Problem: 503 where the library is not installed.
    """
    try:
        import prometheus_client as prometheus
        from prometheus_client import core
    except ImportError:
        raise Problem(503, "Metrics need Prometheus' client: pip install prometheus_client") from None

    class Collector:
        def collect(self) -> Iterator[Any]:
            yield from _of_tasks(core, tasks.counts(), tasks.tally)
            if fleet is not None:
                yield from _of_stations(core, [one.described() for one in fleet.stations.values()])

    registry = prometheus.CollectorRegistry()
    registry.register(Collector())
    return prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST


def _of_tasks(core: Any, counts: Mapping[str, int], tally: Tally) -> Iterator[Any]:
    now = core.GaugeMetricFamily("wan21_tasks", "Tasks that are not over, by state.", labels=["state"])
    for state, number in counts.items():
        now.add_metric([state], number)
    yield now
    ended = core.CounterMetricFamily(
        "wan21_tasks_ended", "Tasks that ended, by station and how.", labels=["station", "state"]
    )
    for labels, number in tally.ended.items():
        ended.add_metric(labels, number)
    yield ended
    took = core.HistogramMetricFamily(
        "wan21_task_seconds", "From start to end of completed tasks.", labels=["station"]
    )
    for station, (each, total) in tally.seconds.items():
        bounds = [*map(str, BOUNDS), "+Inf"]
        took.add_metric([station], [(b, sum(each[: i + 1])) for i, b in enumerate(bounds)], total[0])
    yield took


def _of_stations(core: Any, stations: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    up = core.GaugeMetricFamily("wan21_station_up", "1 for a station that takes jobs.", labels=["station"])
    busy = core.GaugeMetricFamily("wan21_station_busy", "1 for one that runs a job.", labels=["station"])
    lost = core.CounterMetricFamily(
        "wan21_station_jobs_lost", "Jobs that a station died in.", labels=["station"]
    )
    for one in stations:
        up.add_metric([one["name"]], int(one["state"] != "away"))
        busy.add_metric([one["name"]], int(one["state"] == "running"))
        lost.add_metric([one["name"]], one["jobs_lost"])
    yield from (up, busy, lost)
