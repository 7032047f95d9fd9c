"""The engine process: the driver of Ray. It gives calls to workers, watches them, and repeats lost calls.

Requests come through a pipe as (name, *arguments), one at a time; while one is under way, ("cancel",) may.
Answers are (kind, value). When the pipe ends, whoever asked is gone, and the workers go too.
"""

import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import cloudpickle  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import RayError

from ..wan.shard import groups_on
from . import actor
from .cluster import Failed, begin, free, join, start_ray
from .decode import Decode
from .watch import Watch
from .wire import Message, message_of

POLL_SECONDS = 0.05  # for a cancel, between looks at the workers
COME_BACK_SECONDS = 25.0  # for a worker to leave a call, or a meeting; then it is killed
TRIES = 6  # of one call
# Of workers, before they import PyTorch; None takes a variable away.
ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",  # else a lost peer ends the whole process
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "NCCL_SOCKET_IFNAME": "lo",  # no group crosses machines
    "GLOO_SOCKET_IFNAME": "lo",
    "PYTORCH_CUDA_ALLOC_CONF": None,
    "PYTORCH_ALLOC_CONF": None,
}
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": ""}  # Ray leaves all of them to a worker that asks for none


class Cancelled(Exception):
    """Whoever asked wants no answer any more."""


class Lost(Exception):
    """A call that is to be done again with the workers that are left."""


class Worker:
    """An actor, and what the engine knows of it.

    Attributes:
        name: for people.
        pid: of its process.
        machine: name of where it is; one for all of a machine.
    """

    def __init__(self, number: int, handle: Any):
        self.handle = handle
        self.name, self.pid, self.device = f"worker {number}", 0, ""
        self.machine = ""
        self.models: set[str] = set()

    def do(self, name: str, *args: Any) -> Any:
        return self.handle.do.remote(name, *args)

    def control(self, name: str, *args: Any) -> Any:
        return self.handle.control.options(concurrency_group="control").remote(name, *args)


class Start(NamedTuple):
    """What an engine is started with.

    Attributes:
        root: folder of this package.
        count: workers; 0 is one for each GPU of the cluster, or for each of its machines without any.
        gpus: whether each has a GPU of its own; of a cluster, it is asked.
        settings: as of `rank.Rank`.
        hung_seconds: without a sign of life, after which a worker is killed.
        address: of the Ray cluster that workers are started in; empty for one of this machine alone.
    """

    root: str
    count: int
    gpus: bool
    settings: tuple
    hung_seconds: float
    address: str


class Engine:
    """The workers of this machine, or of a cluster.

    Args:
        pipe: to whoever asks.
        folder: private to this engine; Ray's files and the meeting places of groups lie in it.
    """

    def __init__(self, pipe: Connection, start: Start, folder: str):
        self.pipe = pipe
        self.hung_seconds = start.hung_seconds
        self.folder = folder
        self.attempt = 0
        self.epoch = 0
        self.notes: list[str] = []
        self.parts: dict[str, dict[int, Any]] = {}  # of the last message, by model: each counts its own
        self.root, self.settings = start.root, start.settings
        self.in_cluster = bool(start.address)
        if self.in_cluster:
            self.count, self.gpus = join(start.address, start.count)
        else:
            self.count, self.gpus = start.count, start.gpus
            start_ray(self.count, self.gpus, folder)
        cloudpickle.register_pickle_by_value(actor)
        remote: Any = ray.remote  # its stubs do not know concurrency groups
        self.kind = remote(
            num_cpus=1, num_gpus=int(self.gpus), max_restarts=0, concurrency_groups={"control": 1}
        )(actor.Worker)
        self.started = 0
        self.workers: list[Worker] = []
        self._fill()

    # --- requests -------------------------------------------------------------------------------------

    def told(self) -> list[tuple[str, int, str]]:
        """(name, process, device) of each worker."""
        return [(worker.name, worker.pid, worker.device) for worker in self.workers]

    def load(self, key: str, plain: tuple) -> list[tuple[str, int, str]]:
        """Makes a model in every worker that does not have it, first in the place of lost ones. Gives `told`.

        Args:
            plain: message of `(factory, arguments)`.
        """
        self._fill()
        message = message_of(plain)
        parts = ray.put(message.parts)
        refs = {w.do("load", key, message._replace(parts={}), parts): w for w in self.workers}
        for worker, answer in self._gathered(refs):
            if "failed" in answer:
                raise Failed(answer)
            worker.models.add(key)
        if not self.workers:
            raise Lost("no worker is left")
        return self.told()

    def unload(self, keys: Iterable[str]) -> None:
        """Drops models."""
        for key in keys:
            self.parts.pop(key, None)
            for worker in self.workers:
                worker.do("unload", key)

    def ask(self, key: str, name: str, *args: Any) -> list[Any]:
        """What a method of a model gives, of each worker."""
        refs = {w.do("ask", key, name, *args): w for w in self.workers}
        answers = [answer for _, answer in self._gathered(refs)]
        for answer in answers:
            if "failed" in answer:
                raise Failed(answer)
        return [answer["value"] for answer in answers]

    def call(self, key: str, plain: tuple, passes: int, split: str, count: int) -> dict[str, Any]:
        """The velocity of all passes of a call, done again while workers are lost."""
        message = self.keep(key, plain)
        for _ in range(TRIES):
            if not self.workers:
                break
            try:
                return self._call_once(key, message, passes, split, count)
            except Lost as lost:
                self.notes.append(str(lost))
        raise self.lost("no worker is left")

    def decode(self, key: str, plain: tuple, places: Sequence[tuple], count: int) -> dict[str, float]:
        """Parts of a decode, sent as they come and again where they were lost. Gives seconds by worker."""
        message = self.keep(key, plain)
        return Decode(self, key, message, places, self._team(key, count)).run()

    def lost(self, why: str) -> Exception:
        """That nobody is left to do a call."""
        return Lost(self.notes[-1] if self.notes else why)

    def failed(self, worker: Worker, answer: dict[str, Any]) -> Exception:
        """That a call failed at a worker."""
        if answer["failed"] in ("peer", "stopped"):
            return Lost(f"{worker.name} lost another of its group")
        return Failed(answer | {"why": f"{worker.name}: {answer['why']}"})

    def _team(self, key: str, count: int) -> list[Worker]:
        """Who takes part in a call; those of a machine together, the machine with the most first."""
        team = [worker for worker in self.workers if key in worker.models]
        sizes = Counter(worker.machine for worker in team)
        return sorted(team, key=lambda one: (-sizes[one.machine], one.machine))[: count or None]

    def _fill(self) -> None:
        count = self.count - len(self.workers)
        if self.in_cluster and self.started:  # a machine may be gone
            count = min(count, free(self.gpus))
        missing = range(self.started, self.started + count)
        environment = ENVIRONMENT | ({} if self.gpus else WITHOUT_GPU)
        new = [Worker(number, self.kind.remote(self.root, environment, *self.settings)) for number in missing]
        self.started = missing.stop
        there = bool(self.workers)
        for worker in new:
            try:
                begin(worker, self.root, self.settings[1], self.in_cluster)
                self.workers.append(worker)
            except Failed as failed:
                ray.kill(worker.handle)
                if not there:
                    raise
                self.notes.append(f"{failed}; {len(self.workers)} go on")  # nobody in the place of a lost one

    # --- one call -------------------------------------------------------------------------------------

    def keep(self, key: str, plain: tuple) -> Message:
        """Puts new parts of a message where all workers read them, and lets go of those not used any more."""
        message = message_of(plain)
        kept = {n: ref for n, ref in self.parts.get(key, {}).items() if n in message.uses}
        self.parts[key] = kept | {n: ray.put(tuple(part)) for n, part in message.parts.items()}
        return message._replace(parts={})

    def _call_once(self, key: str, message: Message, passes: int, split: str, count: int) -> dict[str, Any]:
        begin = time.perf_counter()
        self.attempt += 1
        team = self._team(key, count)
        formed = groups_on(
            [len([*some]) for _, some in groupby(worker.machine for worker in team)], passes, split
        )
        refs, owner, parts = {}, {}, self.parts[key]
        for group in formed:
            members = [team[rank] for rank in group.ranks]
            name = f"{self.epoch}-" + "-".join(str(worker.pid) for worker in members)
            meeting = str(Path(self.folder) / f"meet-{name}")
            for rank, worker in enumerate(members):
                place = (name, meeting, rank, len(members))
                asked = (key, self.attempt, message, tuple(parts), list(group.passes), place)
                ref = worker.do("call", *asked, *parts.values())  # Ray puts values for references
                refs[ref] = worker
                owner[worker] = group
        velocities: dict[int, Any] = {}
        told: list[tuple[str, float]] = []
        sent = 0
        for worker, answer in self._gathered(refs):
            if "failed" in answer:
                raise self.failed(worker, answer)
            value = answer["value"]
            told.append((worker.name, value["seconds"]))
            sent += value["sent"]
            if value["velocity"] is not None:
                velocities[owner[worker].passes.start] = value["velocity"]
        return {
            "velocities": [velocities[start] for start in sorted(velocities)],
            "workers": sorted(told),
            "groups": [(len(group.ranks), len(group.passes)) for group in formed],
            "sent": sent,
            "seconds": time.perf_counter() - begin,
        }

    def _gathered(self, refs: dict[Any, Worker]) -> list[tuple[Worker, dict[str, Any]]]:
        """What all workers answer. Where one fails or dies, the others are called back, and it is told.

        Raises:
            Cancelled: by whoever asked; all workers are then idle.
            Lost: a worker died or hung, and is no more among `workers`.
        """
        answers: dict[Any, dict[str, Any]] = {}
        watch = Watch(self.workers, self.hung_seconds)
        dead: list[str] = []
        pending = list(refs)
        while pending:
            came, died = self.look(pending, refs, watch)
            answers |= came
            dead += died
            pending = [ref for ref in pending if ref not in came and refs[ref] in self.workers]
            if pending and (dead or any("failed" in answer for answer in answers.values())):
                dead += self.call_back(pending, refs)
                break
        if dead:
            self._new_groups()
            for worker in self.workers:
                worker.do("forget")
            raise Lost(f"{' and '.join(dead)}; {len(self.workers)} left")
        if any("failed" in answer for answer in answers.values()):
            self._new_groups()
        # What went wrong by itself stands before what others saw of it.
        told = [(refs[ref], answer) for ref, answer in answers.items()]
        return sorted(told, key=lambda one: one[1].get("failed") in ("peer", "stopped"))

    def look(
        self, pending: Sequence[Any], refs: Mapping[Any, Worker], watch: Watch
    ) -> tuple[dict[Any, dict[str, Any]], list[str]]:
        """Answers that have come, after a short wait for one; and who died or hung, as sentences.

        Raises:
            Cancelled: as of `_gathered`.
        """
        answers, dead = {}, []
        ready, _ = ray.wait(list(pending), num_returns=1, timeout=POLL_SECONDS)
        for ref in ready:
            try:
                answers[ref] = ray.get(ref)
            except RayError as error:
                dead.append(self._drop(refs[ref], f"died ({type(error).__name__})"))
        if self._is_cancelled():
            self.call_back([ref for ref in pending if ref not in ready], refs)
            raise Cancelled
        for worker in watch.hung():
            ray.kill(worker.handle)
            dead.append(self._drop(worker, f"gave no sign of life for {self.hung_seconds:g} s"))
        return answers, dead

    def call_back(self, pending: list[Any], refs: Mapping[Any, Worker]) -> list[str]:
        """Every worker out of its call; who does not come is killed. Gives sentences on the dead."""
        dead: list[str] = []
        stops = [worker.control("stop", self.attempt) for worker in self.workers]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=COME_BACK_SECONDS)
        if pending:
            back, stuck = ray.wait(pending, num_returns=len(pending), timeout=COME_BACK_SECONDS)
            for ref in back:  # a dead one may be known by its peers before Ray tells
                try:
                    ray.get(ref)
                except RayError as error:
                    dead.append(self._drop(refs[ref], f"died ({type(error).__name__})"))
            for ref in stuck:
                if refs[ref] in self.workers:
                    ray.kill(refs[ref].handle)
                    dead.append(self._drop(refs[ref], "did not leave a call"))
        self._new_groups()
        return dead

    def _new_groups(self) -> None:
        self.epoch += 1
        for worker in self.workers:
            worker.do("leave")

    def _drop(self, worker: Worker, why: str) -> str:
        if worker in self.workers:
            self.workers.remove(worker)
        return f"{worker.name} (process {worker.pid}) {why}"

    def _is_cancelled(self) -> bool:
        return self.pipe.poll() and self.pipe.recv() == ("cancel",)


def serve(pipe: Connection) -> None:
    """Answers requests until the pipe ends. The first is that of an `Engine`."""
    with tempfile.TemporaryDirectory(prefix="wan21-", ignore_cleanup_errors=True) as folder:
        try:
            start = Start(*pipe.recv())
            try:
                engine = Engine(pipe, start, folder)
            except Failed as failed:
                pipe.send(("failed", failed.answer, []))
                return
            pipe.send(("ok", engine.told(), []))
            while True:
                name, *args = pipe.recv()
                if name == "cancel":  # came after its answer
                    continue
                pipe.send((*_answer(engine, name, args), engine.notes))
                engine.notes = []
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass
        finally:
            ray.shutdown()


def _answer(engine: Engine, name: str, args: Sequence[Any]) -> tuple[str, Any]:
    try:
        return "ok", getattr(engine, name)(*args)
    except Cancelled:
        return "cancelled", None
    except Lost as lost:
        return "lost", str(lost)
    except Failed as failed:
        return "failed", failed.answer
