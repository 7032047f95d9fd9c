"""Ray as the engine starts it, or the cluster that it joins; and workers that have just been started."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from .client import not_taken, unreachable
from .traits import difference, traits

if TYPE_CHECKING:
    from .engine import Worker

OBJECT_STORE_BYTES = 512 * 2**20  # of messages: a latent with its image is 43 MB at 720p
START_SECONDS = 300.0  # for a worker to be there: it imports PyTorch and the host's modules
QUIET: dict[str, Any] = {
    "log_to_driver": False, "configure_logging": False, "logging_level": logging.ERROR,
}  # fmt: skip


class Failed(Exception):
    """A call that cannot be done as it was asked for.

    Attributes:
        answer: a worker's.
    """

    def __init__(self, answer: dict[str, Any]):
        super().__init__(answer["why"])
        self.answer = answer


def refused(why: str, fix: str) -> Failed:
    """A refusal for the person at the graph, as a worker's would come."""
    return Failed({"failed": "refused", "why": why, "fix": fix})


def start_ray(count: int, gpus: bool, folder: str) -> None:
    """Ray of this process alone.

    Args:
        count: workers that it has room for.
        gpus: whether each has one.
        folder: for Ray's files.
    """
    ray.init(
        "local",  # never a cluster that somebody else has started
        num_cpus=count,
        num_gpus=count if gpus else 0,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address="127.0.0.1",
        _temp_dir=str(Path(folder) / "r"),
        **QUIET,
    )


def join(address: str, count: int) -> tuple[int, bool]:
    """The cluster at an address. Gives how many workers there can be of `count`, and whether with a GPU each.

    Raises:
        Failed: there is none, it does not take this machine, or it has too little.
    """
    if refusal := unreachable(address):
        raise refused(refusal.problem, refusal.fix)
    try:
        ray.init(address=address, **QUIET)
    except Exception as error:  # of many classes, from wrong tokens to wrong versions
        why = str(error).strip().partition("\n")[0].rstrip(".")
        refusal = not_taken(address, why)
        raise refused(refusal.problem, refusal.fix) from None
    have = ray.cluster_resources()
    gpus = int(have.get("GPU", 0))
    machines = sum(node["Alive"] for node in ray.nodes())
    most = gpus or int(have.get("CPU", 0))
    if count > most:
        kind = "GPUs" if gpus else "CPU cores and no GPU"
        raise refused(
            f"devices is {count}, and the Ray cluster has {most} {kind}", f"Set {most}, or 0 for all"
        )
    return count or gpus or machines, gpus > 0


def free(gpus: bool) -> int:
    """Workers that the cluster has room for now."""
    return int(ray.available_resources().get("GPU" if gpus else "CPU", 0))


def begin(worker: Worker, root: str, paths: Sequence[str], in_cluster: bool) -> None:
    """Waits for a worker that was just started, and looks where it is.

    Raises:
        Failed: it could not start, or it is on a machine where something is of another version.
    """
    try:
        worker.pid, _, worker.device = ray.get(worker.control("where"), timeout=START_SECONDS)
        if not in_cluster:
            return
        worker.machine, at = ray.get(worker.handle.machine.remote(), timeout=START_SECONDS)
        worker.name += f" on {at}"
        there: Any = ray.get(worker.control("traits", root), timeout=START_SECONDS)
    except GetTimeoutError:
        raise refused(
            f"{worker.name} did not start within {START_SECONDS:g} s",
            "See whether other jobs hold the devices (`ray status`), and set fewer devices",
        ) from None
    except RayError as error:
        said = str(error).strip().splitlines()
        raise refused(
            f"{worker.name} could not start ({said[-1] if said else type(error).__name__})",
            "Install ComfyUI, this pack and their Python at the same paths on every machine",
        ) from None
    if differs := difference(traits(root, paths), there):
        raise refused(f"{worker.name} has {differs}", "Install the same versions on every machine")
