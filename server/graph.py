"""A checked input becomes an API graph: one of `workflows/api`, filled in."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

from .fields import DECODE, FIELDS, I2V, LORA, NONE, SAMPLER, SPATIAL, TEMPORAL, available, parse_size

WORKFLOWS = Path(__file__).parents[1] / "workflows" / "api"
CLIP_NODES = ("CLIPVisionLoader", "CLIPVisionEncode")
SMALL_PIXELS = 832 * 480
SHIFT_SMALL, SHIFT_LARGE, SHIFT_FIRST_LAST = 3.0, 5.0, 16.0
LOADERS = {  # part -> (node, input)
    "model": ("Wan21ModelLoader", "model_name"),
    "text_encoder": ("Wan21TextEncoderLoader", "text_encoder_name"),
    "vae": ("Wan21VAELoader", "vae_name"),
    "clip_vision": ("CLIPVisionLoader", "clip_name"),
}
_WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
_TITLED = {"prompt": "Positive prompt", "negative_prompt": "Negative prompt"}  # field -> title of its node


@dataclass
class JobGraph:
    """A graph to queue.

    Attributes:
        nodes: node id -> {"class_type", "inputs", "_meta"}.
        roles: "sampler", "video", "last_frame", "report" -> node id.
        fields: (node id, input name) -> field of the app, to tell the host's complaints by field.
    """

    nodes: dict
    roles: dict
    fields: dict


def load_workflow(end_image):
    """Return the graph to fill in, for a start image or for a start and an end image."""
    name = "first_last_frame.json" if end_image else "i2v.json"
    return json.loads((WORKFLOWS / name).read_text(encoding="utf-8"))


def class_of(graph, node_id):
    """The class of a node, empty for a node that the graph lacks."""
    return graph[node_id]["class_type"] if node_id in graph else ""


def preferred_names(workflow):
    """Return the model files that a workflow names, by part."""
    return {
        part: node["inputs"][name]
        for part, (kind, name) in LOADERS.items()
        for node in workflow.values()
        if node["class_type"] == kind
    }


def build_graph(workflow, values, names, images, first_last, output_prefix, node_inputs):
    """Fill a workflow in.

    Args:
        workflow: of `load_workflow`.
        values: the checked input as a dict, with the seed drawn.
        names: file of each part; clip_vision may be None.
        images: "image", "end_image" -> name in the host's input folder.
        first_last: whether the model is a first-last-frame one.
        output_prefix: folder below the host's output folder.
        node_inputs: node class -> description of its inputs, or None.

    Returns:
        JobGraph.
    """
    builder = _Builder(copy.deepcopy(workflow), node_inputs)
    if names["clip_vision"] is None:
        builder.remove(*CLIP_NODES)
    for part, (kind, name) in LOADERS.items():
        builder.set(kind, name, names[part], part)
    for field, title in (("image", "Start image"), ("end_image", "End image")):
        if images.get(field):
            builder.set(title, "image", images[field], field)
    builder.add_options(values)
    builder.set_fields(values | {"shift": _shift(values, first_last)})
    return JobGraph(builder.nodes, builder.finish(output_prefix), builder.fields)


def _shift(values, first_last):
    if values["shift"] is not None:
        return values["shift"]
    if first_last and values["end_image"]:
        return SHIFT_FIRST_LAST
    width, height = parse_size(values["size"])
    return SHIFT_SMALL if width * height <= SMALL_PIXELS else SHIFT_LARGE


class _Builder:
    def __init__(self, nodes, node_inputs):
        self.nodes = nodes
        self.fields = {}
        self._inputs_of = node_inputs

    def find(self, title_or_class):
        """Ids of the nodes with this title, or else of this class."""
        titled = [i for i, node in self.nodes.items() if node["_meta"]["title"] == title_or_class]
        return titled or [i for i, node in self.nodes.items() if node["class_type"] == title_or_class]

    def set(self, title_or_class, name, value, field):
        for node_id in self.find(title_or_class):
            if not isinstance(self.nodes[node_id]["inputs"].get(name), list):  # linked ones stay
                self.nodes[node_id]["inputs"][name] = value
            self.fields[node_id, name] = field

    def remove(self, *classes):
        gone = {i for i, node in self.nodes.items() if node["class_type"] in classes}
        self.nodes = {i: node for i, node in self.nodes.items() if i not in gone}
        for node in self.nodes.values():
            node["inputs"] = {
                name: value
                for name, value in node["inputs"].items()
                if not (isinstance(value, list) and value[0] in gone)
            }

    def add(self, kind, title, **inputs):
        """Add a node; inputs that are not given take their defaults. Returns its id."""
        defaults = {}
        for name, spec in (self._inputs_of(kind) or {}).items():
            options = spec.get("options") or [None]
            if spec["type"] in _WIDGETS and spec.get("default", options[0]) is not None:
                defaults[name] = spec.get("default", options[0])
        node_id = str(1 + max(map(int, self.nodes)))
        self.nodes[node_id] = {"class_type": kind, "inputs": defaults | inputs, "_meta": {"title": title}}
        return node_id

    def add_options(self, values):
        """Put the nodes in that only some jobs need."""
        [sampler], [video], [decode] = self.find(SAMPLER), self.find("CreateVideo"), self.find(DECODE)
        if values["lora_url"]:
            model = self.nodes[sampler]["inputs"]["model"]
            self.nodes[sampler]["inputs"]["model"] = [self.add(LORA, "LoRA", model=model), 0]
        frames = [decode, 0]
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

    def set_fields(self, values):
        """Set every field that has an input of its own, and those that take more than that."""
        for field in FIELDS:
            if field.node and available(field, self._inputs_of) and values[field.name] is not None:
                value = values[field.name]
                self.set(
                    field.node, field.input, field.choices[value] if field.choices else value, field.name
                )
        for field, title in _TITLED.items():
            if values[field]:
                self.set(title, "text", values[field], field)
        width, height = parse_size(values["size"])
        self.set(I2V, "width", width, "size")
        self.set(I2V, "height", height, "size")
        if values["vae_tile_size"] is not None:
            for kind in (I2V, DECODE):
                self.set(kind, "tile_size", str(values["vae_tile_size"]), "vae_tile_size")

    def finish(self, output_prefix):
        """Name the outputs, save the last frame too, and return the roles."""
        [video], [save], [report] = self.find("CreateVideo"), self.find("SaveVideo"), self.find("PreviewAny")
        self.nodes[save]["inputs"]["filename_prefix"] = f"{output_prefix}/video"
        images = self.nodes[video]["inputs"]["images"]
        last = self.add("ImageFromBatch", "Last frame", image=images, batch_index=-1, length=1)
        prefix = f"{output_prefix}/last_frame"
        saved = self.add("SaveImage", "Save last frame", images=[last, 0], filename_prefix=prefix)
        [sampler] = self.find(SAMPLER)
        return {"sampler": sampler, "video": save, "last_frame": saved, "report": report}
