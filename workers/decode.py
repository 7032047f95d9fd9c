"""A decode over the workers, in the engine's process: who has done a part takes the next."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .watch import Watch
from .wire import Message

if TYPE_CHECKING:
    from .engine import Engine, Worker

AHEAD = 2  # pieces asked of a worker: it goes on while what it gave is on its way


class Turn:
    """A part of a decode at a worker.

    Args:
        first: reference to the first piece.

    Attributes:
        refs: to the pieces that it was asked for, in order.
    """

    def __init__(self, worker: Worker, place: tuple, first: Any):
        self.worker, self.place = worker, place
        self.begin = time.perf_counter()
        self.refs = deque([first])
        self.ask()

    def ask(self) -> None:
        while len(self.refs) < AHEAD:
            self.refs.append(self.worker.do("take"))


class Decode:
    """Parts of a decode, each at a worker; a part that is lost is done again by another.

    Args:
        message: what is decoded.
        places: of the parts.
        team: who decodes.
    """

    def __init__(
        self, engine: Engine, key: str, message: Message, places: Sequence[tuple], team: Sequence[Worker]
    ):
        self.engine, self.key, self.message = engine, key, message
        self.left = deque(places)
        self.idle = deque(team)
        self.turns: list[Turn] = []
        self.seconds: dict[str, float] = {}  # by name of worker

    def run(self) -> dict[str, float]:
        """Sends pieces to whoever asked, as they come. Gives the seconds of each worker.

        Raises:
            Cancelled, Failed, Lost: as of a call of a model; all workers are then idle.
        """
        engine = self.engine
        engine.attempt += 1
        watch = Watch(engine.workers, engine.hung_seconds)
        while self.left or self.turns:
            self._give()
            if not self.turns:
                raise engine.lost("no worker is left")
            owners = {ref: turn.worker for turn in self.turns for ref in turn.refs}
            came, dead = engine.look([turn.refs[0] for turn in self.turns], owners, watch)
            for turn in [turn for turn in self.turns if turn.refs[0] in came]:
                answer = came[turn.refs.popleft()]
                if "failed" in answer:
                    engine.call_back([ref for ref in owners if ref not in came], owners)
                    raise engine.failed(turn.worker, answer)
                self._take(turn, answer["value"])
            if dead:
                self._lose(dead)
        return self.seconds

    def _give(self) -> None:
        while self.left and self.idle:
            worker, place, parts = self.idle.popleft(), self.left.popleft(), self.engine.parts[self.key]
            asked = (self.key, self.engine.attempt, self.message, tuple(parts), place)
            self.turns.append(Turn(worker, place, worker.do("begin", *asked, *parts.values())))

    def _take(self, turn: Turn, value: Any) -> None:
        if value is not None:
            self.engine.pipe.send(("part", value, []))
            turn.ask()
            return
        name = turn.worker.name  # what else it was asked for is nothing as well
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - turn.begin
        self.turns.remove(turn)
        self.idle.append(turn.worker)

    def _lose(self, dead: Sequence[str]) -> None:
        alive = self.engine.workers
        self.left.extendleft(turn.place for turn in self.turns if turn.worker not in alive)
        self.turns = [turn for turn in self.turns if turn.worker in alive]
        self.idle = deque(worker for worker in self.idle if worker in alive)
        self.engine.notes.append(
            f"{' and '.join(dead)}; {len(alive)} left, and its part of the frame is decoded again"
        )
