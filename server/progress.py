"""The host's messages about one job become a state, a percentage and log lines."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from .fields import DECODE, I2V, SAMPLER, SPATIAL, TEMPORAL
from .graph import Graph
from .states import CANCELLING, PREPARING, RUNNING, UPLOADING

WEIGHTS = {SAMPLER: 80.0, DECODE: 10.0, TEMPORAL: 6.0, SPATIAL: 4.0, I2V: 4.0}  # rough shares of the time
OTHER_WEIGHT = 0.5
MAX_LOGS = 40


class News(NamedTuple):
    """What one message of the host says about a job.

    Attributes:
        state: the state it is in now, None where the message does not tell.
        line: for the task's log.
    """

    state: int | None = None
    line: str | None = None


class JobProgress:
    """Follows one job.

    Args:
        graph, roles: of the job's `JobGraph`.
        clock: in seconds, for the time per step.
    """

    def __init__(self, graph: Graph, roles: dict[str, str], clock: Callable[[], float] = time.monotonic):
        self._classes = {node_id: node["class_type"] for node_id, node in graph.items()}
        self._roles = roles
        self._clock = clock
        self._done = dict.fromkeys(graph, 0.0)
        self._steps: list[tuple[int, float]] = []  # (step, when)

    def handle(self, kind: str, data: dict[str, Any]) -> News:
        """Counts one message of the host in, and says what is new."""
        if kind == "execution_start":
            return News(PREPARING, "started")
        if kind == "execution_cached":
            self._done |= {node_id: 1.0 for node_id in data["nodes"] if node_id in self._done}
        if kind == "executing" and data["node"] is not None:
            return News(self._state(data["node"]))
        if kind == "progress_state":
            return self._update(data["nodes"])
        return News()

    @property
    def percent(self) -> float:
        """The part of the work that is done, in [0, 100]."""
        weights = {i: WEIGHTS.get(kind, OTHER_WEIGHT) for i, kind in self._classes.items()}
        return round(100 * sum(weights[i] * self._done[i] for i in weights) / sum(weights.values()), 1)

    def _update(self, nodes: dict[str, dict[str, Any]]) -> News:
        state = line = None
        for node_id, at in nodes.items():
            if node_id not in self._done:
                continue
            self._done[node_id] = 1.0 if at["state"] == "finished" else at["value"] / max(1, at["max"])
            if at["state"] == "running":
                state = self._state(node_id)
                if node_id == self._roles["sampler"]:
                    line = self._step(int(at["value"]), int(at["max"]))
        return News(state, line)

    def _state(self, node_id: str) -> int | None:
        if node_id == self._roles["sampler"]:
            return RUNNING
        return UPLOADING if node_id in (self._roles["video"], self._roles["last_frame"]) else None

    def _step(self, step: int, steps: int) -> str | None:
        if not step or (self._steps and self._steps[-1][0] == step):
            return None
        self._steps.append((step, self._clock()))
        if len(self._steps) == 1:
            return f"step {step}/{steps}"
        (first, begin), (last, end) = self._steps[0], self._steps[-1]
        return f"step {step}/{steps}, {(end - begin) / (last - first):.2f} s per step"


def later(state: int, new: int | None) -> int:
    """The state after `new` is reported: a state never goes back, and a cancel in progress stays."""
    return new if new is not None and state != CANCELLING and new > state else state
