"""MODEL and VAE after the node, and such as go wrong on demand in the process of a worker."""

import os
import time
from pathlib import Path

import pytest
import torch
from wan21 import workers
from wan21.host.decode import LoadedVae, load_vae_recipe
from wan21.host.rank import LoadedModel, load_recipe

ON_RAY = [
    pytest.mark.xdist_group("workers"),  # one engine for all of them
    pytest.mark.skipif(workers.cannot_run() is not None, reason=str(workers.cannot_run())),
]
LONG = pytest.mark.skipif("WORKERS_LONG" not in os.environ, reason="half a minute: WORKERS_LONG=1 runs it")


def shared(model, split="auto", devices=2):
    """A MODEL after the node."""
    from wan21.nodes.workers import Wan21Workers

    return Wan21Workers.execute(model, devices, split).result[0]


class _Fault:
    """What a file says that is named by this process: `memory` once, or `slow`."""

    def __init__(self, folder):
        self.file = Path(folder) / str(os.getpid())

    def around(self, watch):
        def faulty_watch():
            watch()
            if not self.file.exists():
                return
            if self.file.read_text() == "memory":
                self.file.unlink()
                raise torch.OutOfMemoryError("pretended: out of memory")
            time.sleep(0.05)

        return faulty_watch


class Faulty(LoadedModel):
    """A model whose blocks do as a file says."""

    def __init__(self, recipe, folder):
        super().__init__(load_recipe(recipe).patcher)
        self.fault = _Fault(folder)

    def pid(self):
        return os.getpid()

    def gpus_seen(self):
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    def call(self, asked, passes, shard, watch):
        return super().call(asked, passes, shard, self.fault.around(watch))


class FaultyVae(LoadedVae):
    """A VAE whose layers do as a file says."""

    def __init__(self, recipe, folder):
        super().__init__(load_vae_recipe(recipe).vae)
        self.fault = _Fault(folder)

    def pieces(self, asked, place, watch):
        return super().pieces(asked, place, self.fault.around(watch))
