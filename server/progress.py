"""The host's messages about one job become a state, a percentage and log lines."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from .fields import DECODE, I2V, JOIN, LORA, SAMPLER, SPATIAL, TEMPORAL
from .graph import Graph
from .problems import of_node
from .states import CANCELLING, PREPARING, RUNNING, UPLOADING

WEIGHTS = {
    SAMPLER: 80.0,
    DECODE: 10.0,
    TEMPORAL: 6.0,
    SPATIAL: 4.0,
    I2V: 4.0,
    JOIN: 1.0,
}  # rough shares of the time
OTHER_WEIGHT = 0.5
MAX_LOGS = 40
MAX_SAID = 256  # nodes
STEP = "step "  # how a line on a step begins
NOTE = "note: "  # and one of the sampler's report on what was adjusted or left out

Said = dict[str, list[str]]  # by what a node is and all that it hangs on, what it said when it last ran


class News(NamedTuple):
    """What one message of the host says about a job.

    Attributes:
        state: the state it is in now, None where the message does not tell.
        line: for the task's log.
        said: sentences of nodes, which go into the log once.
    """

    state: int | None = None
    line: str | None = None
    said: tuple[str, ...] = ()


class JobProgress:
    """Follows one job.

    Args:
        graph, roles: of the job's `JobGraph`.
        said: shared by all jobs. A node that the host need not run again says nothing, so it is told here.
        clock: in seconds, for the time per step.

    Attributes:
        said: as given.
    """

    def __init__(
        self, graph: Graph, roles: dict[str, str], said: Said, clock: Callable[[], float] = time.monotonic
    ):
        self._graph = graph
        self.said = said
        self._classes = {node_id: node["class_type"] for node_id, node in graph.items()}
        self._roles = roles
        self._clock = clock
        self._done = dict.fromkeys(graph, 0.0)
        self._identities: dict[str, str] = {}
        self._samplers = [i for i, kind in self._classes.items() if kind == SAMPLER]  # one a segment
        self._reports = [i for role, i in roles.items() if role.startswith("report")]
        self._steps: dict[str, list[tuple[int, float]]] = {}  # sampler -> (step, when)

    def handle(self, kind: str, data: dict[str, Any]) -> News:
        """Counts one message of the host in, and says what is new."""
        if kind == "execution_start":
            return News(PREPARING, "started")
        if kind == "execution_cached":
            known = [node_id for node_id in data["nodes"] if node_id in self._graph]
            self._done |= dict.fromkeys(known, 1.0)
            return News(said=tuple(line for i in known for line in self.said.get(self._identity(i), ())))
        if kind == "executing" and data["node"] in self._graph:
            self.said.pop(self._identity(data["node"]), None)
            return News(self._state(data["node"]))
        if kind == "progress_state":
            return self._update(data["nodes"])
        if kind == "progress_text" and data["node"] in self._graph:
            return News(said=self._sentences(data["node"], data["text"]))
        if kind == "executed":
            return News(said=tuple(self._of_reports(data["node"], data.get("output") or {})))
        return News()

    @property
    def percent(self) -> float:
        """The part of the work that is done, in [0, 100]."""
        weights = {i: WEIGHTS.get(kind, OTHER_WEIGHT) for i, kind in self._classes.items()}
        return round(100 * sum(weights[i] * self._done[i] for i in weights) / sum(weights.values()), 1)

    def _sentences(self, node_id: str, text: str) -> tuple[str, ...]:
        """One a line: a node's text holds all that it has said in this run."""
        told = (" ".join(line.split()) for line in text.splitlines())
        found = tuple(of_node(self._classes[node_id], line) for line in told if line)
        lines = self.said.setdefault(self._identity(node_id), [])
        lines += [line for line in found if line not in lines]
        while len(self.said) > MAX_SAID:
            del self.said[next(iter(self.said))]
        return found

    def _identity(self, node_id: str) -> str:
        """What decides whether the host runs a node again: its class and inputs, and those of its sources."""
        if node_id not in self._identities:
            node = self._graph[node_id]
            inputs = {
                name: [self._identity(value[0]), value[1]] if isinstance(value, list) else value
                for name, value in node["inputs"].items()
            }
            # A digest: written out, the sources of the last of many segments would fill the memory.
            written = json.dumps([node["class_type"], inputs], sort_keys=True)
            self._identities[node_id] = hashlib.sha256(written.encode()).hexdigest()
        return self._identities[node_id]

    def _of_reports(self, node_id: str, output: dict[str, Any]) -> Iterable[str]:
        """What the reports that a node shows say of matching and adjusting."""
        texts = output.get("text") or [""]
        lines = texts[0].splitlines()
        if node_id == self._roles.get("lora_report"):
            return [of_node(LORA, line) for line in lines]
        if node_id in self._reports:
            return [of_node(SAMPLER, line.removeprefix(NOTE)) for line in lines if line.startswith(NOTE)]
        return []

    def _update(self, nodes: dict[str, dict[str, Any]]) -> News:
        state = line = None
        for node_id, at in nodes.items():
            if node_id not in self._done:
                continue
            self._done[node_id] = 1.0 if at["state"] == "finished" else at["value"] / max(1, at["max"])
            if at["state"] == "running":
                state = self._state(node_id)
                if node_id in self._samplers:
                    line = self._step(node_id, int(at["value"]), int(at["max"]))
        return News(state, line)

    def _state(self, node_id: str) -> int | None:
        if node_id in self._samplers:
            return RUNNING
        return UPLOADING if node_id in (self._roles["video"], self._roles["last_frame"]) else None

    def _step(self, sampler: str, step: int, steps: int) -> str | None:
        taken = self._steps.setdefault(sampler, [])
        if not step or (taken and taken[-1][0] == step):
            return None
        taken.append((step, self._clock()))
        line = f"{STEP}{step}/{steps}"
        if len(self._samplers) > 1:
            line += f" of segment {1 + self._samplers.index(sampler)}"
        (first, begin), (last, end) = taken[0], taken[-1]
        return line if len(taken) == 1 else f"{line}, {(end - begin) / (last - first):.2f} s per step"


def later(state: int, new: int | None) -> int:
    """The state after `new` is reported: a state never goes back, and a cancel in progress stays."""
    return new if new is not None and state != CANCELLING and new > state else state
