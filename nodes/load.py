"""Loaders: a file becomes a standard MODEL, CLIP or VAE."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import folder_paths
from comfy_api.latest import io

from .. import host
from ..wan.files import BadFile, WrongKind
from ..wan.files.kinds import CLIP_VISION, LORA, UMT5, WAN21_DIT, WAN21_VAE
from ..wan.refusal import Refusal
from .named import named

CATEGORY = "Wan2.1 I2V"
WHERE_TO_PICK = {
    WAN21_DIT: "pick it in Wan21ModelLoader",
    WAN21_VAE: "pick it in Wan21VAELoader",
    UMT5: "pick it in Wan21TextEncoderLoader",
    LORA: "load the base model here and the LoRA with Wan21LoraLoader",
    CLIP_VISION: "pick it in the host's CLIPVisionLoader",
}
_LATER_SHARD = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.safetensors$")


def file_names(folder: str) -> list[str]:
    """Names in one of the host's model folders; a sharded set is listed once, by its first shard."""
    return [name for name in folder_paths.get_filename_list(folder) if not _LATER_SHARD.search(name)]


def model_names() -> list[str]:
    """Diffusion models, GGUF files among them, and whole-pipeline checkpoints; each name once."""
    names = file_names("diffusion_models") + gguf_names("diffusion_models")
    return list(dict.fromkeys(names + file_names("checkpoints")))


_gguf_names: dict[str, tuple[list[str], dict[str, float]]] = {}  # names below a root, its folders' times


def gguf_names(folder: str) -> list[str]:
    """GGUF files, which the host does not list, by its rules: links are followed, .GGUF counts as .gguf."""
    names: set[str] = set()
    for root in folder_paths.get_folder_paths(folder):
        found, folders = _gguf_names.get(root, ([], {}))
        if not folders or any(not os.path.isdir(f) or os.path.getmtime(f) != t for f, t in folders.items()):
            every, folders = folder_paths.recursive_search(root, excluded_dir_names=[".git"])
            found = folder_paths.filter_files_extensions(every, [".gguf"])
            _gguf_names[root] = found, folders
        names.update(found)
    return sorted(names)


@contextmanager
def about_file(name: str) -> Iterator[None]:
    """Inside, a refusal gets the file's name in front; that of a file of another kind says where to pick it.

    Raises:
        Refusal: in place of any other.
    """
    try:
        yield
    except BadFile:
        raise  # with its own name, or that of another shard of the set
    except WrongKind as error:
        kind, fix = error.kind, error.fix
        if kind is not None and kind in WHERE_TO_PICK:
            fix = f"It is {kind.what}; {WHERE_TO_PICK[kind]}"
        raise Refusal(f"{name}: {error.problem}", fix) from error
    except Refusal as error:
        raise error.about(name) from error


def load(folders: str | tuple[str, ...], name: str, build: Callable[..., Any], *args: str) -> io.NodeOutput:
    """What `build(path, *args)` makes of a file; the file's name stands in front of its refusals.

    Args:
        folders: the host's model folders in which it may lie, the first before the others.
        name: of the file in them.
        build: from the host's side.
        args: of `build`, after the path.
    """
    folders = (folders,) if isinstance(folders, str) else folders
    found = (path for folder in folders if (path := folder_paths.get_full_path(folder, name)))
    path = next(found, None) or folder_paths.get_full_path_or_raise(folders[0], name)
    with about_file(name):
        return io.NodeOutput(build(path, *args))


class Wan21ModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21ModelLoader",
            display_name="Wan2.1 Model Loader",
            category=CATEGORY,
            description="Load a Wan2.1 text-to-video, image-to-video or first-last-frame model.",
            search_aliases=["wan", "diffusion model", "unet loader", "i2v", "flf2v", "t2v"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=model_names(),
                    tooltip="A file in models/diffusion_models or checkpoints: ComfyUI's, diffusers' or "
                    "the release's layout, sharded sets by their first shard, or GGUF.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", *host.WEIGHT_DTYPES],
                    default="default",
                    tooltip="How weights are kept. default: as in the file. fp8 halves the memory of the "
                    "blocks; _fast also multiplies in fp8, on NVIDIA GPUs from RTX 40 on. int8_convrot and "
                    "fp8_e4m3fn_rows multiply the feed-forward alone in 8 bits: int8 from RTX 20 on, fp8 "
                    "from RTX 40 on. fp16_fast also sums in fp16: faster on GeForce cards; where a sum "
                    "overflows, the run stops and says so.",
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    @named("Wan21ModelLoader")
    def execute(cls, model_name: str, weight_dtype: str) -> io.NodeOutput:
        return load(("diffusion_models", "checkpoints"), model_name, host.load_model, weight_dtype)


class Wan21TextEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21TextEncoderLoader",
            display_name="Wan2.1 Text Encoder Loader",
            category=CATEGORY,
            description="Load the umT5 text encoder of a Wan2.1 model, for CLIPTextEncode.",
            search_aliases=["umt5", "t5", "clip loader", "wan text encoder"],
            inputs=[
                io.Combo.Input(
                    "text_encoder_name",
                    options=file_names("text_encoders") + gguf_names("text_encoders"),
                    tooltip="A umT5 file in models/text_encoders, GGUF too. Files without a tokenizer inside "
                    "need spiece.model beside them.",
                ),
                io.Combo.Input(
                    "device",
                    options=["default", "cpu"],
                    default="default",
                    tooltip="cpu keeps the encoder out of GPU memory; encoding a prompt is then slower.",
                    advanced=True,
                ),
            ],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    @named("Wan21TextEncoderLoader")
    def execute(cls, text_encoder_name: str, device: str) -> io.NodeOutput:
        return load("text_encoders", text_encoder_name, host.load_text_encoder, device)


class Wan21VAELoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Wan21VAELoader",
            display_name="Wan2.1 VAE Loader",
            category=CATEGORY,
            description="Load a Wan2.1 VAE. It streams: memory on the device does not grow with the frames.",
            search_aliases=["wan vae", "vae loader"],
            inputs=[
                io.Combo.Input(
                    "vae_name", options=file_names("vae"), tooltip="A Wan2.1 VAE file in models/vae."
                ),
                io.Combo.Input(
                    "precision",
                    options=["auto", *host.DTYPES],
                    default="auto",
                    tooltip="auto encodes in float32, as the release does, and decodes in what the host "
                    "chooses for the device: bf16, else fp16, else fp32 (the most exact, twice as large).",
                ),
            ],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    @named("Wan21VAELoader")
    def execute(cls, vae_name: str, precision: str) -> io.NodeOutput:
        return load("vae", vae_name, host.load_vae, precision)
