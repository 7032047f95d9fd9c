"""A real host that runs graphs, once with native parts and once with ours, and gives back their tensors."""

import copy
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from ..comfy_client import GraphRejected, JobFailed
from ..host_server import HostServer
from ..pack import LINK_NAME

PROBE = Path(__file__).with_name("probe")
TIMEOUT_S = 300  # compiling takes long on a busy machine
# What the host says when one of our nodes refuses a graph that is being queued.
OUR_WORD = re.compile(r"^Wan21\w+ \(node [^)]*\): Refused", re.MULTILINE)
# Of a run, not of a difference.
FIGURES = re.compile(r"s per step$|GiB estimated beside")


@dataclass
class Outcome:
    """What came of one run.

    Attributes:
        tensors: what the graph gave, by output and place in it; empty after an error.
        notes: what nodes said on themselves, in order.
        error: the sentence a person reads, or None.
        refused: whether the error is a refusal of ours.
    """

    tensors: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    error: str | None = None
    refused: bool = False


class Bench:
    """The host, as a context manager; it is started anew after a run that does not end.

    Args:
        base: an empty folder for all that the host writes.
        models: a folder laid out like ComfyUI's `models`.
        packs: folders of other packs to install.

    Attributes:
        server: the running `HostServer`.
        nodes: the host's description of every node.
        results: outcomes that rows share, by a name of theirs.
    """

    def __init__(self, base, models, packs=()):
        self.base, self.models = Path(base), Path(models)
        self.packs = [PROBE, *map(Path, packs)]
        self.count, self.results = 0, {}

    def __enter__(self):
        custom = self.base / "custom_nodes"
        custom.mkdir(parents=True, exist_ok=True)
        for pack in self.packs:
            (custom / pack.name).symlink_to(pack.resolve(), target_is_directory=True)
        self._start()
        self.nodes = self.server.client.object_info()
        return self

    def __exit__(self, *_):
        self.server.stop()

    def _start(self):
        own = {
            "OMP_NUM_THREADS": "1",  # small tensors: a second thread only waits
            # A host that is stopped while it compiles leaves half a library, which the next would load.
            "TORCHINDUCTOR_CACHE_DIR": str(self.base / f"compiled{self.count}"),
        }
        with mock.patch.dict(os.environ, own):
            self.server = HostServer(self.base, self.models).__enter__()

    def run(self, graph, *links, timeout_s=TIMEOUT_S):
        """Run an API graph and return the `Outcome`.

        Args:
            graph: node id -> {"class_type", "inputs"}.
            links: [node id, index] of each value to be compared; without any, the files that the graph
                writes are compared.
            timeout_s: a run that takes longer is an error of that name.
        """
        self.count += 1
        graph, written = copy.deepcopy(graph), set(self._written())
        for i, link in enumerate(links):
            inputs = {"value": link, "name": f"run{self.count}_{i}"}
            graph[f"dump{i}"] = {"class_type": "ProbeDump", "inputs": inputs}
        try:
            job = self.server.client.run(graph, timeout_s=timeout_s)
        except GraphRejected as error:
            return Outcome(error=str(error), refused=bool(OUR_WORD.search(str(error))))
        except JobFailed as error:
            return _failed(error, str(self.base.parent))
        except OSError as error:  # TimeoutError and ConnectionError too
            self.server.stop()
            self._start()
            return Outcome(error=f"no end: {error}")
        return Outcome(self._read(written), _notes(job))

    def once(self, name, run):
        """The outcome that `run()` gives, run the first time that it is asked for by this name."""
        if name not in self.results:
            self.results[name] = run()
        return self.results[name]

    def _written(self):
        return self.server.output_directory.rglob("*.safetensors")

    def _read(self, before):
        from safetensors.torch import load_file

        found = {}
        for i, path in enumerate(sorted(set(self._written()) - before)):
            found |= {f"{i}:{key}": value for key, value in load_file(path).items()}
            path.unlink()
        return found


def _failed(error, folder):
    raised = [data for kind, data in error.job.events if kind == "execution_error"]
    kind = raised[-1]["exception_type"] if raised else ""
    ours = LINK_NAME in kind
    message = str(error) if ours else f"{kind.rpartition('.')[2]}: {error}"
    notes = _notes(error.job)
    return Outcome(notes=notes, error=" ".join(message.replace(f"{folder}/", "").split()), refused=ours)


def _notes(job):
    """What nodes said, but for the time and the memory of a run."""
    lines = [line for _, text in job.texts for line in text.splitlines()]
    return [line for line in dict.fromkeys(lines) if not FIGURES.search(line)]
