"""A checked input becomes an API graph: one of `workflows/api`, filled in."""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fields import (
    DECODE,
    FIELDS,
    GROUPS,
    I2V,
    JOIN,
    LORA,
    NONE,
    SAMPLER,
    SPATIAL,
    TEMPORAL,
    NodeInputs,
    available,
    parse_size,
)

Graph = dict[str, dict[str, Any]]  # node id -> {"class_type", "inputs", "_meta": {"title"}}

WORKFLOWS = Path(__file__).parents[1] / "workflows" / "api"
CLIP_NODES = ("CLIPVisionLoader", "CLIPVisionEncode")
SMALL_PIXELS = 832 * 480
SHIFT_SMALL, SHIFT_LARGE, SHIFT_FIRST_LAST = 3.0, 5.0, 16.0
WORKERS = "Wan21Workers"
LOADERS = {  # part -> (node, input)
    "model": ("Wan21ModelLoader", "model_name"),
    "text_encoder": ("Wan21TextEncoderLoader", "text_encoder_name"),
    "vae": ("Wan21VAELoader", "vae_name"),
    "clip_vision": ("CLIPVisionLoader", "clip_name"),
}
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_TITLED = {"prompt": "Positive prompt", "negative_prompt": "Negative prompt"}  # field -> title of its node
REPORT, LORA_REPORT = "Report", "LoRA report"  # titles
KNOWN_FRAMES = 5  # of a segment, from which the next goes on
SEEDS = 2**64  # of the sampler


@dataclass
class JobGraph:
    """A graph to queue.

    Attributes:
        nodes: the graph.
        roles: "sampler" (of the first segment), "video", "last_frame", "report", "report 2" ... of further
            segments, and with a LoRA "lora_report" -> node id.
        fields: (node id, input name) -> field of the app that set it.
    """

    nodes: Graph
    roles: dict[str, str]
    fields: dict[tuple[str, str], str]


def load_workflow(end_image: bool) -> Graph:
    """The graph to fill in, for a start image alone or with an end image; the sampler's report is kept."""
    name = "Wan2.1 first and last frame (flf2v).json" if end_image else "Wan2.1 image to video (i2v).json"
    graph: Graph = json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))
    [sampler] = find(graph, "Wan21Sampler")
    number = str(1 + max(map(int, graph)))
    graph[number] = {
        "class_type": "PreviewAny",
        "inputs": {"source": [sampler, 1]},
        "_meta": {"title": REPORT},
    }
    return graph


def class_of(graph: Graph, node_id: str) -> str:
    """The class of a node, empty for a node that the graph lacks."""
    return graph[node_id]["class_type"] if node_id in graph else ""


def find(graph: Graph, title_or_class: str) -> list[str]:
    """Ids of the nodes with this title, or else of this class."""
    titled = [i for i, node in graph.items() if node["_meta"]["title"] == title_or_class]
    return titled or [i for i, node in graph.items() if node["class_type"] == title_or_class]


def without(graph: Graph, *classes: str) -> Graph:
    """A copy of a graph without the nodes of these classes and without the links from them."""
    kept = {i: copy.deepcopy(node) for i, node in graph.items() if node["class_type"] not in classes}
    for node in kept.values():
        inputs = node["inputs"].items()
        node["inputs"] = {n: v for n, v in inputs if not isinstance(v, list) or v[0] in kept}
    return kept


def preferred_names(workflow: Graph) -> dict[str, str]:
    """The model files that a workflow names, by part."""
    return {
        part: node["inputs"][name]
        for part, (kind, name) in LOADERS.items()
        for node in workflow.values()
        if node["class_type"] == kind
    }


def as_written(text: str) -> str:
    """A prompt for the host's text encoder node, such that the text encoder gets `text` itself.

    The host reads `(word:1.2)` as a weight and a word that begins with `embedding:` as the name of a file. It
    takes a bracket behind a backslash for text, and NUL with \\1 or \\2 for a bracket; a backslash alone is
    one. The wide colon is the plain one to umT5's tokenizer, to which \\1 and \\2 are nothing.
    """
    text = re.sub("\0[\1\2]+", "\0", text)
    text = re.sub(r"(?<!\S)embedding:", "embedding：", text)  # noqa: RUF001
    return re.sub(r"([()])", r"\\\1", text)


def build_graph(
    workflow: Graph,
    values: Mapping[str, Any],
    names: Mapping[str, str],
    images: Mapping[str, str],
    first_last: bool,
    output_prefix: str,
    node_inputs: NodeInputs,
) -> JobGraph:
    """A workflow, filled in.

    Args:
        workflow: of `load_workflow`; it is not changed.
        values: the checked input by field, with the seed drawn.
        names: file of each part in `LOADERS`; without one for clip_vision its nodes are left out.
        images: "image", "end_image" -> name in the host's input folder.
        first_last: whether the model is a first-last-frame one.
        output_prefix: folder below the host's output folder.
        node_inputs: node class -> description of its inputs, or None.
    """
    unused = CLIP_NODES if "clip_vision" not in names else ()
    builder = _Builder(without(workflow, *unused), node_inputs)
    for part, file in names.items():
        builder.set(*LOADERS[part], file, part)
    for field, title in (("image", "Start image"), ("end_image", "End image")):
        if images.get(field):
            builder.set(title, "image", images[field], field)
    builder.add_segments(values["segments"])
    builder.add_options(values)
    builder.set_fields({**values, "shift": _shift(values, first_last)})
    return JobGraph(builder.nodes, builder.finish(output_prefix), builder.fields)


def add_workers(job: JobGraph, devices: int) -> None:
    """Lets steps and decodes be shared between devices, where there are several for a job."""
    if devices == 1:
        return
    number = str(1 + max(map(int, job.nodes)))
    inputs: dict[str, Any] = {"devices": devices, "split": "auto"}
    for output, (name, kind) in enumerate((("model", SAMPLER), ("vae", DECODE))):
        users = [node["inputs"] for node in job.nodes.values() if node["class_type"] == kind]
        inputs[name] = users[0][name]
        for user in users:
            user[name] = [number, output]
    job.nodes[number] = {"class_type": WORKERS, "inputs": inputs, "_meta": {"title": "Workers"}}


def _shift(values: Mapping[str, Any], first_last: bool) -> float:
    if values["shift"] is not None:
        return values["shift"]
    if first_last and values["end_image"]:
        return SHIFT_FIRST_LAST
    return SHIFT_LARGE if is_large(values["size"]) else SHIFT_SMALL


def is_large(size: str) -> bool:
    """Whether a video of a `size` has more pixels than the release's small one."""
    width, height = parse_size(size)
    return width * height > SMALL_PIXELS


def _is_on(group: str, values: Mapping[str, Any]) -> bool:
    """Whether a field asks for anything of a group of the sampler's inputs."""
    neutral = {row.name: row.neutral for row in FIELDS}
    return any(values[field] != neutral[field] for field in GROUPS[group][2])


class _Builder:
    """Changes a graph in place, and notes which field set which input."""

    def __init__(self, nodes: Graph, node_inputs: NodeInputs):
        self.nodes = nodes
        self.fields: dict[tuple[str, str], str] = {}
        self._inputs_of = node_inputs

    def only(self, title_or_class: str) -> str:
        """The id of the one node with this title or class."""
        [node_id] = find(self.nodes, title_or_class)
        return node_id

    def set(self, title_or_class: str, name: str, value: Any, field: str) -> None:
        """Sets an input of all nodes with this title or class; one that is linked keeps its link."""
        for node_id in find(self.nodes, title_or_class):
            if not isinstance(self.nodes[node_id]["inputs"].get(name), list):
                self.nodes[node_id]["inputs"][name] = value
            self.fields[node_id, name] = field

    def add(self, kind: str, title: str, **inputs: Any) -> str:
        """Adds a node and returns its id; inputs that are not given have their defaults."""
        defaults = {}
        for name, spec in (self._inputs_of(kind) or {}).items():
            options = spec.get("options") or [None]
            if "." not in name and spec["type"] in _WIDGETS and spec.get("default", options[0]) is not None:
                defaults[name] = spec.get("default", options[0])
        node_id = str(1 + max(map(int, self.nodes)))
        self.nodes[node_id] = {"class_type": kind, "inputs": defaults | inputs, "_meta": {"title": title}}
        return node_id

    def add_segments(self, prompts: Sequence[str]) -> None:
        """Adds a segment for each prompt, as in the graph `segments`: it goes on from the one before."""
        first = {kind: self.only(kind) for kind in (I2V, SAMPLER, DECODE)}
        features = find(self.nodes, "CLIPVisionEncode")
        video = self.nodes[self.only("CreateVideo")]["inputs"]
        prompt, report = self.only(_TITLED["prompt"]), self.only(REPORT)
        frames: list[Any] = [first[DECODE], 0]
        for number, text in enumerate(prompts, 2):
            last = {"image": frames, "batch_index": -KNOWN_FRAMES, "length": KNOWN_FRAMES}
            known = self.add("ImageFromBatch", f"Last frames of {number - 1}", **last)
            links: dict[str, Any] = {"start_image": [known, 0]}
            if features:
                one = {"image": [known, 0], "batch_index": 0, "length": 1}
                picture = self.add("ImageFromBatch", f"First of the last frames of {number - 1}", **one)
                links["clip_vision_start"] = [self._copy(features[0], number, image=[picture, 0]), 0]
            links["positive"] = [self._copy(prompt, number, text=as_written(text)), 0]
            self.fields[links["positive"][0], "text"] = "segments"
            start = self._copy(first[I2V], number, **links)
            inputs = {"positive": [start, 0], "negative": [start, 1], "latent": [start, 2]}
            sampler = self._copy(first[SAMPLER], number, **inputs)
            self._copy(report, number, source=[sampler, 1])
            frames = [self._copy(first[DECODE], number, latent=[sampler, 0]), 0]
            clips = {"images_1": video["images"], "images_2": frames}
            join = {"overlap": KNOWN_FRAMES, "blend": "linear", "match_color": False}
            video["images"] = [self.add(JOIN, f"Join {number}", **clips, **join), 0]

    def _copy(self, node_id: str, number: int, **inputs: Any) -> str:
        """Adds a node like another for a further segment, and returns its id."""
        node = copy.deepcopy(self.nodes[node_id])
        node["inputs"] |= inputs
        node["_meta"]["title"] += f" {number}"
        copied = str(1 + max(map(int, self.nodes)))
        self.nodes[copied] = node
        return copied

    def add_options(self, values: Mapping[str, Any]) -> None:
        """Adds the nodes that only some jobs need: LoRA loader, upsamplers."""
        samplers, video = find(self.nodes, SAMPLER), self.only("CreateVideo")
        if values["lora_url"]:
            model = self.nodes[samplers[0]]["inputs"]["model"]
            lora = self.add(LORA, "LoRA", model=model)
            for sampler in samplers:
                self.nodes[sampler]["inputs"]["model"] = [lora, 0]
            self.add("PreviewAny", LORA_REPORT, source=[lora, 1])
        frames = self.nodes[video]["inputs"]["images"]
        if values["temporal_upsampling"] != NONE:
            node = self.add(TEMPORAL, "More frames", images=frames)
            frames = [node, 0]
            self.nodes[video]["inputs"]["fps"] = [node, 1]
            self.set(TEMPORAL, "fps", values["fps"], "fps")
        if values["spatial_upsampling"] != NONE:
            larger = self.add(SPATIAL, "Larger frames", images=frames)
            if values["spatial_upsampling"] == "model":
                loader = self.add("UpscaleModelLoader", "Upscale model")
                self.nodes[larger]["inputs"]["upscale_model"] = [loader, 0]
                self.fields[loader, "model_name"] = "spatial_upsampling"
            frames = [larger, 0]
        self.nodes[video]["inputs"]["images"] = frames

    def set_fields(self, values: Mapping[str, Any]) -> None:
        """Sets the fields of the table that have a node input, then those that set more than one."""
        for row in FIELDS:
            value, group = values[row.name], (row.input or "").split(".")[0]
            if value is None or (group in GROUPS and not _is_on(group, values)):
                continue
            if row.node and row.input and available(row, self._inputs_of):
                self.set(row.node, row.input, row.choices[value] if row.choices else value, row.name)
        for group, (off, on, fields) in GROUPS.items():
            self.set(SAMPLER, group, on if _is_on(group, values) else off, fields[0])
        for field, title in _TITLED.items():
            if values[field]:
                self.set(title, "text", as_written(values[field]), field)
        for i, node_id in enumerate(find(self.nodes, SAMPLER)):  # segments of one prompt differ
            self.nodes[node_id]["inputs"]["seed"] = (values["seed"] + i) % SEEDS
        width, height = parse_size(values["size"])
        self.set(I2V, "width", width, "size")
        self.set(I2V, "height", height, "size")
        if values["vae_tile_size"] is not None:
            for kind in (I2V, DECODE):
                self.set(kind, "tile_size", str(values["vae_tile_size"]), "vae_tile_size")

    def finish(self, output_prefix: str) -> dict[str, str]:
        """Names the outputs, saves the last frame too, and returns the roles."""
        video, save, report = (self.only(name) for name in ("CreateVideo", "SaveVideo", REPORT))
        samplers = find(self.nodes, SAMPLER)
        self.nodes[save]["inputs"]["filename_prefix"] = f"{output_prefix}/video"
        images = self.nodes[video]["inputs"]["images"]
        last = self.add("ImageFromBatch", "Last frame", image=images, batch_index=-1, length=1)
        prefix = f"{output_prefix}/last_frame"
        saved = self.add("SaveImage", "Save last frame", images=[last, 0], filename_prefix=prefix)
        roles = {"sampler": samplers[0], "video": save, "last_frame": saved, "report": report}
        for number in range(2, 1 + len(samplers)):
            roles[f"report {number}"] = self.only(f"{REPORT} {number}")
        reports = find(self.nodes, LORA_REPORT)
        return roles | ({"lora_report": reports[0]} if reports else {})
