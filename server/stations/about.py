"""What a station's ComfyUI says of itself, and whether a graph's files are there."""

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aiohttp import web

from ..graph import LOADERS, Graph

if TYPE_CHECKING:
    from ...host.queue import Host

ROOT = Path(__file__).resolve().parents[2]
STATION = "WAN21_STATION"  # in the environment of a station's ComfyUI
CODE = ("host", "nodes", "wan", "server", "frames", "net", "workers", "workflows")
# Inputs that name a model file.
NAMES = (*LOADERS.values(), ("UpscaleModelLoader", "model_name"))


class About(NamedTuple):
    """A station's ComfyUI.

    Attributes:
        pack: of `pack_digest`.
        device: what it computes on.
        lists: files that a node's input takes, by the node's class.
    """

    pack: str
    device: str
    lists: Mapping[str, list[str]]

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> "About":
        """What was told as JSON."""
        return cls(told["pack"], told["device"], told["lists"])


def files_of(graph: Graph) -> frozenset[tuple[str, str]]:
    """(node class, file) of every file that a graph names."""
    named = dict(NAMES)
    return frozenset(
        (node["class_type"], node["inputs"][named[node["class_type"]]])
        for node in graph.values()
        if node["class_type"] in named
    )


def lacking(about: About, graph: Graph) -> list[str]:
    """Files that a graph names and a station does not have."""
    return sorted(name for node, name in files_of(graph) if name not in about.lists.get(node, ()))


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

    async def about(_: web.Request) -> web.Response:
        inputs = {node: (host.node_inputs(node) or {}).get(name) or {} for node, name in NAMES}
        lists = {node: spec.get("options") or [] for node, spec in inputs.items()}
        return web.json_response({"pack": pack_digest(), "device": host.device_name, "lists": lists})

    app = web.Application()
    app.add_routes([web.get("/station", about)])
    return app
