"""Lay the API graphs out for the editor: `workflows/api/*.json` -> `workflows/*.json` and `subgraphs/*.json`.

The API graphs are the source. The real editor turns each into its own format and fills in the inputs
a graph lacks; folded nodes, apps and blueprints come from the tables below, places and notes from
`lib/workflow_layout.py` and `lib/workflow_notes.py`. Run it after changing an API graph or a node's inputs,
and `make_thumbnails.py` when the pictures should change too.

    python scripts/make_workflows.py                           # all of them; needs a Chromium
    python scripts/make_workflows.py "Wan2.1 text to video (t2v)"    # this one
"""

import copy
import json
import re
import sys
import tempfile
import uuid

from lib.editor import NODES_2, api_graph, editor_graph, load_api_graph, load_graph, open_editor
from lib.host_server import HostServer
from lib.pack import ROOT, comfyui_path
from lib.subgraphs import Fold, blueprint, folded
from lib.workflow_layout import arranged, first_sizes, with_heights
from lib.workflow_notes import FILES, note, offer_download

WORKFLOWS = ROOT / "workflows"
SUBGRAPHS = ROOT / "subgraphs"
SETTLED_MS = 2500  # Nodes 2.0 measures what it drew


def _segment(number):
    """What of a segment that goes on from the one before is one node."""
    before = number - 1
    return Fold(
        title=f"Segment {number}",
        titles=(
            f"Positive prompt {number}",
            f"Last frames of {before}",
            f"First of the last frames of {before}",
            f"Start image features {number}",
            f"Image to video {number}",
            f"Sampler {number}",
            f"Decode {number}",
            f"Join {number}",
        ),
        shown=(
            (f"Positive prompt {number}", "text", "prompt"),
            (f"Image to video {number}", "num_frames", "num_frames"),
            (f"Sampler {number}", "seed", "seed"),
            (f"Join {number}", "match_color", "match_color"),
        ),
        labels=(
            (f"Last frames of {before}", "image", "frames before"),
            (f"Join {number}", "images_1", "clip so far"),
            (f"Decode {number}", 0, "frames"),
            (f"Join {number}", 0, "clip"),
        ),
    )


FOLDS = {"Wan2.1 long video in segments": [_segment(2), _segment(3)]}

# Graphs that are there as a form too: (title, input, label or None for the editor's own) from top to bottom.
FORM = (
    ("Start image", "image", None),
    ("Positive prompt", "text", "prompt"),
    ("Image to video", "num_frames", None),
    ("Sampler", "seed", None),
)
APPS = {"Wan2.1 - quick start": FORM, "Wan2.1 image to video (i2v)": FORM}
APP = "{}.app"  # the browser marks these as apps, and so does the sidebar when one is saved

COMMON = (
    ("Positive prompt", "text", "prompt"),
    ("Negative prompt", "text", "negative prompt"),
    ("Image to video", "width", "width"),
    ("Image to video", "height", "height"),
    ("Image to video", "num_frames", "num_frames"),
    ("Sampler", "seed", "seed"),
    ("Sampler", "steps", "steps"),
    ("Model", "model_name", "model"),
    ("Text encoder", "text_encoder_name", "text encoder"),
    ("VAE", "vae_name", "VAE"),
)
CLIP_VISION = (("CLIP vision", "clip_name", "CLIP vision"),)
OUTSIDE = {"Start image", "End image", "Save video"}
# Blueprint -> the graph it is made of, what stands on it, and its sentence in the node search.
BLUEPRINTS = {
    "Wan2.1 Image to Video Pipeline": (
        "Wan2.1 image to video (i2v)",
        COMMON + CLIP_VISION,
        "A still image and a prompt become a video with Wan2.1: loaders, sampler and decode in one node.",
    ),
    "Wan2.1 First-Last-Frame to Video": (
        "Wan2.1 first and last frame (flf2v)",
        COMMON + CLIP_VISION,
        "The video that leads from a first to a last image with Wan2.1, in one node.",
    ),
    "Wan2.1 Image to Video 4 Steps": (
        "Wan2.1 4 steps image to video (lightx2v)",
        (*COMMON, ("LoRA", "lora_name", "LoRA"), *CLIP_VISION),
        "A still image becomes a video in four steps with Wan2.1 and a step-distilled LoRA, in one node.",
    ),
}
ALIASES = ["wan", "i2v", "image to video", "img2vid", "video generation"]


def main():
    """Write the editor graphs of the API graphs named on the command line, or of all, and these anew."""
    names = sys.argv[1:] or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        plain, graphs = {}, {}
        with open_editor(server.url) as page:
            for name in names:
                path = WORKFLOWS / "api" / f"{name}.json"
                load_api_graph(page, json.loads(path.read_text(encoding="utf-8")), name)
                _write(path, api_graph(page))
                plain[name] = with_sources(editor_graph(page))
                graphs[name] = described(plain[name], name)
                load_graph(page, graphs[name])
                graphs[name] = with_heights(graphs[name], heights(page))
        with open_editor(server.url, settings=NODES_2) as page:
            for name, graph in graphs.items():
                load_graph(page, graph)
                page.wait_for_timeout(SETTLED_MS)
                graphs[name] = arranged(with_heights(graph, heights(page, drawn=True)))
    for name, graph in graphs.items():
        _write(WORKFLOWS / f"{name}.json", graph)
        if name in APPS:
            _write(WORKFLOWS / f"{APP.format(name)}.json", as_app(graph, APPS[name]))
    for name, (source, shown, description) in BLUEPRINTS.items():
        if source in plain:
            _write(SUBGRAPHS / f"{name}.json", as_blueprint(plain[source], name, shown, description))


def heights(page, drawn=False):
    """Return what each node needs: id, as text -> pixels."""
    of = "node.size[1]" if drawn else "node.computeSize()[1]"
    return dict(page.evaluate(f"() => app.graph._nodes.map(node => [String(node.id), {of}])"))


def with_sources(graph):
    """Return a graph whose nodes name the pack they come from, and loaders where their files are.

    The editor offers what is missing by it.
    """
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ours = re.search(r'^name = "(.+)"', project, re.M)[1], re.search(r'^version = "(.+)"', project, re.M)[1]
    version = (comfyui_path() / "comfyui_version.py").read_text(encoding="utf-8")
    core = "comfy-core", re.search(r'"([\d.]+)"', version)[1]
    for node in graph["nodes"]:
        node["properties"] |= dict(zip(("cnr_id", "ver"), ours if node["type"].startswith("Wan21") else core))
        if node["type"] in FILES:
            offer_download(node)
    return graph


def described(graph, name):
    """Return an editor graph with its folded nodes, first sizes and its note."""
    files = [file for node in graph["nodes"] for file in node["properties"].get("models", ())]
    for fold in FOLDS.get(name, ()):
        graph = folded(graph, fold, name)
    graph = graph | {"nodes": [*graph["nodes"], note(name, files, graph["last_node_id"] + 1)]}
    identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, f"wan21/{name}"))
    return first_sizes(graph | {"id": identifier, "last_node_id": graph["last_node_id"] + 1})


def as_app(graph, form):
    """Return the graph as a form (App Mode): these inputs, and the saved video."""
    graph = copy.deepcopy(graph)
    by_title = {node["title"]: node for node in graph["nodes"]}
    inputs = [[by_title[title]["id"], name] for title, name, _ in form]
    for title, name, label in form:
        if label:
            next(slot for slot in by_title[title]["inputs"] if slot["name"] == name)["label"] = label
    data = {"inputs": inputs, "outputs": [by_title["Save video"]["id"]]}
    identifier = str(uuid.uuid5(uuid.UUID(graph["id"]), "app"))
    return graph | {"id": identifier, "extra": graph["extra"] | {"linearMode": True, "linearData": data}}


def as_blueprint(graph, name, shown, description):
    """Return the graph without its images and its file as one node for the node search."""
    titles = tuple(node["title"] for node in graph["nodes"] if node["title"] not in OUTSIDE)
    labels = (
        ("Image to video", "start_image", "start image"),
        ("Image to video", "end_image", "end image"),
        ("Start image features", "image", "start image"),
        ("End image features", "image", "end image"),
        ("Create video", 0, "video"),
    )
    fold = Fold(name, titles, shown, labels, description)
    return blueprint(graph, fold, aliases=ALIASES)


def _write(path, graph):
    path.write_text(json.dumps(graph, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
