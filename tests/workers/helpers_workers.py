"""A model whose calls go wrong on demand, in the process of a worker."""

import os
import time
from pathlib import Path

import torch
from wan21.host.rank import LoadedModel, load_recipe


class Faulty(LoadedModel):
    """Does in each block what a file says that is named by this process: `memory` once, or `slow`."""

    def __init__(self, recipe, folder):
        super().__init__(load_recipe(recipe).patcher)
        self.file = Path(folder) / str(os.getpid())

    def call(self, asked, passes, shard, watch):
        def faulty_watch():
            watch()
            if not self.file.exists():
                return
            fault = self.file.read_text()
            if fault == "memory":
                self.file.unlink()
                raise torch.OutOfMemoryError("pretended: out of memory")
            time.sleep(0.05)

        return super().call(asked, passes, shard, faulty_watch)
