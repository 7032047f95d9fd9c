"""The host's own Wan templates, queued as its editor would, with native loaders and with ours."""

import copy
import json
import re

from ..editor import api_graph, find_browser, load_graph, open_editor
from ..pack import comfyui_path
from ..random_checkpoints import TEXT_ENCODER, VAE
from ..small_graphs import panning_clip
from .checkpoints import LORA, dit_file, dit_kind
from .graphs import HEIGHT, WIDTH, loader, node, our_lora
from .rows import NOT_TRIED, REFUSED, Row, Verdict, compare

FRAMES = 9
CLIP = "compat-clip.mp4"
SIZES = {
    "width": WIDTH, "height": HEIGHT, "length": FRAMES, "num_frames": FRAMES, "batch_size": 1,
    "ref_max_size": WIDTH,
}  # fmt: skip
RESIZED = {"resize_type.longer_size": WIDTH, "resize_type.megapixels": 0.01, "megapixels": 0.01}  # anywhere
MANY_STEPS, FEWER = 16, 5  # so many steps and more are divided by this, with the places of experts in them
# What makes a latent or a conditioning of a given size; other nodes with a width keep theirs.
SIZED = re.compile(r"(Wan|ARVideo|Bernini|Empty).*")


class Templates:
    """Each template of the host that loads a Wan model."""

    title = "The host's Wan templates"
    headings = ("template", "diffusion models", "frames beside the native loaders")
    about = (
        "Each template of the host whose text encoder is umT5 is opened in the real editor and queued in "
        "small: its loaders (Load Diffusion Model, Load CLIP, Load VAE, LoraLoaderModelOnly) once as they "
        "are and once replaced by ours, on the same small random files under the key names of those that it "
        "names; weight_dtype is default. All else, samplers included, is the template's. Equal means that no "
        "value of the decoded frames differs by more than 1/255. CLIP vision features are random, those of "
        "both runs the same. Templates of partner nodes (a web service) load no model and are left out."
    )

    def __init__(self):
        self.prompts = {}

    def missing(self, bench):
        """Why the section cannot be run here, or None."""
        return None if find_browser() else "not run: there is no Chromium, whose editor reads the templates"

    def names(self, bench):
        """Ids of the templates."""
        return [name for name, graph in _templates() if _is_wan(graph)]

    def prepare(self, bench, names):
        """Convert them to API graphs by the real editor."""
        client, graphs = bench.server.client, dict(_templates())
        example = comfyui_path() / "input" / "example.png"
        client.upload_image(example)
        client.upload_image(panning_clip(example, (WIDTH, HEIGHT), FRAMES, 8), CLIP)
        with open_editor(bench.server.url) as page:
            for name in names:
                load_graph(page, graphs[name])
                self.prompts[name] = api_graph(page)

    def row(self, bench, name):
        """Try one of them."""
        prompt = self.prompts[name]
        foreign = ["one that the editor does not know" for n in prompt.values() if not n.get("class_type")]
        prompt = {i: n for i, n in prompt.items() if n.get("class_type")}
        files = sorted({n["inputs"]["unet_name"] for n in prompt.values() if n["class_type"] == "UNETLoader"})
        about = ", ".join(files) or "none"
        kinds = {file: dit_kind(file) for file in files}
        if unknown := [file for file, kind in kinds.items() if kind is None]:
            return Row(name, about, [Verdict(NOT_TRIED, f"no small file is known for {', '.join(unknown)}")])
        for kind in sorted(set(kinds.values())):
            loaded = bench.once(("loads", kind), lambda kind=kind: _load(bench, kind))
            if loaded.refused:
                return Row(name, about, [Verdict(REFUSED, loaded.error)])
        foreign += {n["class_type"] for n in prompt.values()} - bench.nodes.keys()
        if foreign:
            names = ", ".join(sorted(set(foreign)))
            return Row(name, about, [Verdict(NOT_TRIED, f"nodes that this host does not have: {names}")])
        graph, links = small(prompt, {i for i, info in bench.nodes.items() if info["output_node"]})
        if not links:
            return Row(name, about, [Verdict(NOT_TRIED, "no frames at its end")])
        native = bench.run(with_loaders(graph, "native"), *links)
        ours = bench.run(with_loaders(graph, "ours"), *links)
        if native.error and ours.error and not ours.refused:
            return Row(name, about, [Verdict(NOT_TRIED, f"in small it fails natively: {native.error}")])
        return Row(name, about, [compare(native, ours, pictures=True)])


def _load(bench, kind):
    return bench.run({"model": loader("ours", dit_file(kind))}, ["model", 0])


def _templates():
    from comfyui_workflow_templates import get_asset_path, iter_templates

    for entry in iter_templates():
        for asset in entry.assets:
            if asset.filename.endswith(".json"):
                path = get_asset_path(entry.template_id, asset.filename)
                with open(path, encoding="utf-8") as file:
                    yield entry.template_id, json.load(file)


def _is_wan(graph):
    return "nodes" in graph and "umt5_xxl" in json.dumps(graph)


def small(prompt, outputs):
    """(the graph in small without what saves and shows, links to the frames that it would have saved).

    Args:
        prompt: the graph in API form.
        outputs: classes that save or show.
    """
    used = {link[0] for n in prompt.values() for link in n["inputs"].values() if isinstance(link, list)}
    ends = {i for i, n in prompt.items() if n["class_type"] in outputs and i not in used}
    links = [_frames(prompt, prompt[i]["inputs"]) for i in ends if prompt[i]["class_type"].startswith("Save")]
    links = [link for link in links if link] or [
        [i, 0] for i, n in prompt.items() if n["class_type"] == "VAEDecode"
    ]
    graph = copy.deepcopy({i: n for i, n in prompt.items() if i not in ends})
    for n in graph.values():
        _shrink(n["class_type"], n["inputs"])
    return graph, sorted(links)


def _shrink(class_type, inputs):
    inputs |= {k: v for k, v in RESIZED.items() if k in inputs}
    if SIZED.fullmatch(class_type):
        inputs |= {k: v for k, v in SIZES.items() if k in inputs}
    elif class_type == "LoadImage":
        inputs["image"] = "example.png"
    elif class_type == "LoadVideo":
        inputs["file"] = CLIP
    elif isinstance(steps := inputs.get("steps"), int) and steps >= MANY_STEPS:
        for name in ("steps", "start_at_step", "end_at_step"):
            if isinstance(inputs.get(name), int):
                inputs[name] //= FEWER


def _frames(prompt, inputs):
    """The link to the frames that an output node shows, through Create Video where there is one."""
    link = inputs.get("images") or inputs.get("video")
    while isinstance(link, list) and prompt[link[0]]["class_type"] == "CreateVideo":
        link = prompt[link[0]]["inputs"]["images"]
    return link if isinstance(link, list) else None


def with_loaders(graph, kind):
    """The graph with native loaders or ours, on small files."""
    return {key: _loader(n, kind) for key, n in graph.items()}


def _loader(n, kind):
    native, inputs = kind == "native", n["inputs"]
    if n["class_type"] == "UNETLoader":
        return loader(kind, dit_file(dit_kind(inputs["unet_name"])))
    if n["class_type"] == "CLIPLoader":
        if native:
            return node("ProbeCLIPLoader", clip_name=TEXT_ENCODER)
        return node("Wan21TextEncoderLoader", text_encoder_name=TEXT_ENCODER, device="default")
    if n["class_type"] == "VAELoader":
        if native:
            return node("VAELoader", vae_name=VAE)
        return node("Wan21VAELoader", vae_name=VAE, precision="auto")
    if n["class_type"] in ("LoraLoaderModelOnly", "LoraLoader"):
        return _lora(inputs, native)
    if n["class_type"] == "ModelPatchLoader":
        return node("ProbeModelPatch", kind="InfiniteTalk" if "talk" in inputs["name"].lower() else "Uni3C")
    if n["class_type"] == "AudioEncoderEncode":
        return node("ProbeSpeech")
    if n["class_type"] == "CLIPVisionEncode":
        return node("ProbeCLIPVision", image=inputs["image"])
    return n


def _lora(inputs, native):
    model, strength = inputs["model"], inputs["strength_model"]
    if native:
        return node("LoraLoaderModelOnly", model=model, lora_name=LORA, strength_model=strength)
    return our_lora(model, LORA, strength)
