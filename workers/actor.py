"""What Ray starts on a device: loads this package in its process, and hands everything on to a `Rank`.

Ray pickles this class whole, because a worker's Python does not know the package by name. So nothing here may
need another module of it before `load_pack` has run.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

NAME = "wan21"  # of the package in the processes that we start


def load_pack(root: str) -> None:
    """Makes a folder importable as `NAME`, whatever it is called."""
    if NAME in sys.modules:
        return
    file = Path(root) / "__init__.py"
    spec = importlib.util.spec_from_file_location(NAME, file, submodule_search_locations=[root])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)


class Worker:
    """A process with a device of its own; its methods are those of `rank.Rank`.

    Args:
        root: folder of this package, on this machine.
        environment: variables to set before PyTorch is imported; None takes one away.
        settings: as of `rank.Rank`.
    """

    def __init__(self, root: str, environment: dict[str, str | None], *settings: Any):
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        load_pack(root)
        self.rank = importlib.import_module(f"{NAME}.workers.rank").Rank(*settings)

    def do(self, name: str, *args: Any) -> Any:
        """One after the other, in one thread."""
        return getattr(self.rank, name)(*args)

    def machine(self) -> tuple[str, str]:
        """(Ray's name of the machine, its address)."""
        import ray  # by which this process was started

        return ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()

    def control(self, name: str, *args: Any) -> Any:
        """In a thread of its own: answers also while `do` computes or waits."""
        return getattr(self.rank, name)(*args)
