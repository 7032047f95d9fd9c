"""What a station's ComfyUI says of itself, and whether a graph's files are there."""

import asyncio
import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from ..graph import LOADERS, Graph
from ..installed import Installed, Shelf
from ..model_set import File
from ..traits import Traits

if TYPE_CHECKING:
    from ...host.queue import Host

ROOT = Path(__file__).resolve().parents[2]
STATION = "WAN21_STATION"  # in the environment of a station's ComfyUI
CODE = ("host", "nodes", "wan", "server", "frames", "net", "workers", "workflows")
# Inputs that name a model file.
NAMES = (*LOADERS.values(), ("UpscaleModelLoader", "model_name"))


class Named(NamedTuple):
    """A model file that an input of a node names."""

    node_id: str
    node_class: str
    input: str
    file: str


class About(NamedTuple):
    """A station's ComfyUI.

    Attributes:
        pack: of `pack_digest`.
        device: what it computes on.
        lists: files that a node's input takes, by the node's class.
        shelf: what those of the loaders are.
        prints: what tells these from others of their names; see `Installed.prints`.
    """

    pack: str
    device: str
    lists: Mapping[str, list[str]]
    shelf: Shelf
    prints: Mapping[tuple[str, str], str]

    def has(self, named: Named) -> bool:
        """Whether a file is there."""
        return named.file in self.lists.get(named.node_class, ())

    def lacks(self, graph: Graph) -> list[Named]:
        """The files of a graph that are not there."""
        return [named for named in files_in(graph) if not self.has(named)]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "About":
        """What was told as JSON."""
        shelf = {
            part: {name: File(name, Traits(**traits), bundled) for name, (traits, bundled) in files.items()}
            for part, files in told["shelf"].items()
        }
        prints = {(node, name): found for node, name, found in told["prints"]}
        return cls(told["pack"], told["device"], told["lists"], shelf, prints)


def files_in(graph: Graph) -> list[Named]:
    """The model files that a graph names."""
    inputs = dict(NAMES)
    return [
        Named(node_id, kind, inputs[kind], node["inputs"][inputs[kind]])
        for node_id, node in graph.items()
        if (kind := node["class_type"]) in inputs and inputs[kind] in node["inputs"]
    ]


@cache
def pack_digest() -> str:
    """Of this pack's code: two that differ may compute differently."""
    digest = hashlib.sha256()
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".json"):
                digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def create_station_app(host: "Host") -> web.Application:
    """What a station's ComfyUI serves in the place of the job API, on loopback."""
    installed = Installed(host, host.weight_formats)

    async def tell(_: web.Request) -> web.Response:
        inputs = {node: (host.node_inputs(node) or {}).get(name) or {} for node, name in NAMES}
        lists = {node: spec.get("options") or [] for node, spec in inputs.items()}
        shelf = {
            part: {name: (asdict(file.traits), file.bundled) for name, file in files.items()}
            for part, files in (await asyncio.to_thread(installed.shelf)).items()
        }
        prints = [(*key, found) for key, found in (await asyncio.to_thread(installed.prints)).items()]
        about = {"pack": pack_digest(), "device": host.device_name, "lists": lists, "shelf": shelf}
        return web.json_response(about | {"prints": prints})

    app = web.Application()
    app.add_routes([web.get("/station", tell)])
    return app
