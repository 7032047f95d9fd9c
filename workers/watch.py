"""Whether workers live, asked while they compute."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from .engine import Worker

HEARTBEAT_SECONDS = 1.0  # between questions whether a worker lives


class Watch:
    """Asks workers for a sign of life while they compute.

    Args:
        workers: that are asked.
        patience: seconds.
    """

    def __init__(self, workers: Sequence[Worker], patience: float):
        self.workers = workers
        self.patience = patience
        self.asked: dict[Any, tuple[Worker, float]] = {}
        self.next = time.monotonic() + HEARTBEAT_SECONDS

    def hung(self) -> list[Worker]:
        """Workers that do not answer."""
        now = time.monotonic()
        if self.asked:
            done, _ = ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)
            for ref in done:
                del self.asked[ref]
        silent = [w for w, since in self.asked.values() if now - since > self.patience]
        self.asked = {ref: one for ref, one in self.asked.items() if one[0] not in silent}
        if now >= self.next:
            waiting = [worker for worker, _ in self.asked.values()]
            for worker in self.workers:
                if worker not in waiting:
                    self.asked[worker.control("where")] = (worker, now)
            self.next = now + HEARTBEAT_SECONDS
        return silent
