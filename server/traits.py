"""What a model file is and whether its loader would take it, by its header: no weight is read.

The checks are the loaders' own (`wan.files`, `detect_config`), on shapes; of the numbers, the marks of
quantised layers alone are looked at.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from ..wan.config import WanConfig, detect_config
from ..wan.dit import WanModel
from ..wan.files import (
    WrongKind,
    check_keys,
    detect_kind,
    read_shapes,
    refuse_loose_scales,
    to_umt5_keys,
    to_wan_dit_keys,
    to_wan_vae_keys,
    umt5_config,
    umt5_shapes,
    vae_dim,
)
from ..wan.files.gguf import read_gguf
from ..wan.files.kinds import addition_in
from ..wan.files.marks import IN_METADATA, MARK, check_scales, mark_of, marks_in, unpacked_shapes
from ..wan.files.umt5 import TOKENIZER_KEY, tokenizer_beside
from ..wan.files.umt5_gguf import umt5_gguf_shapes
from ..wan.refusal import Refusal, printable
from ..wan.vae import WanVAE

OLD_MARK, OLD_SCALE = "scaled_fp8", ".scale_weight"  # one mark for all layers of a part that have a scale
SAFETENSORS = (".safetensors", ".sft")
# Where the two layouts of CLIP vision files that the host loads keep the width; and, by layer, a norm.
CLIP_LAYOUTS = (
    ("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.{}.layer_norm1.weight"),
    ("visual.class_embedding", "visual.transformer.resblocks.{}.ln_1.weight"),
)
VIT_H_LAYERS = range(31, 48)  # the host takes this many for ViT-H


@dataclass(frozen=True)
class Traits:
    """What one file is, for the part in whose folder it lies.

    Attributes:
        refusal: why it is not for its part, or would not load, in sentences; empty where it is and would.
        foreign: whether it is simply something else, such as a model of another family.
        unread: whether it may well fit, but shows nothing without being loaded.
        text_width: width of the text features that a DiT reads, or that an encoder gives.
        image_width: width of the CLIP vision features, likewise; None for a DiT without an image branch.
        vae_dim: channels of a VAE at its first level.
        first_last: whether a DiT is for a first and a last image.
        has_addition: whether a DiT's file holds another model's weights beside, which are not used.
    """

    refusal: str = ""
    foreign: bool = False
    unread: bool = False
    text_width: int | None = None
    image_width: int | None = None
    vae_dim: int | None = None
    first_last: bool = False
    has_addition: bool = False


def read_traits(part: str, path: Path, formats: Collection[str] | None) -> Traits:
    """What a file is.

    Args:
        part: "model", "text_encoder", "vae" or "clip_vision".
        formats: quantised formats that the host's layers read; None is all.
    """
    try:
        return _READERS[part](path, formats)
    except WrongKind as error:
        what = f"it is {error.kind.what}" if error.kind else error.problem
        return Traits(refusal=what, foreign=True)
    except ValueError as error:
        refusal = str(error).removeprefix(f"{printable(path.name)}: ")
        logging.info("Wan2.1 jobs: %s would not load: %s", printable(str(path)), refusal)
        return Traits(refusal=refusal)
    except Exception as error:  # one strange file must not stop the jobs that use others
        logging.warning("Wan2.1 jobs: %s cannot be looked at", printable(str(path)), exc_info=True)
        return Traits(refusal=f"it cannot be looked at ({type(error).__name__}: {error})")


def _read_model(path: Path, formats: Collection[str] | None) -> Traits:
    if path.suffix.lower() == ".gguf":
        metadata: Mapping[str, str] = {}
        packed = read_gguf(path)
        shapes = to_wan_dit_keys({k: torch.empty(p.shape, device="meta") for k, p in packed.items()})
    else:
        state_dict, metadata = read_shapes(path)
        state_dict = to_wan_dit_keys(state_dict)
        found = _formats(state_dict, metadata)
        _check_formats(state_dict, found, formats)
        marks = {f"{layer}{MARK}": torch.empty(0) for layer in found}
        shapes = unpacked_shapes(state_dict, found) | marks
    config = detect_config(shapes, metadata)
    left_out = check_keys(_model_shapes(config), shapes)
    if not config.takes_image:
        return Traits(refusal="it is a text-to-video model, which takes no image", foreign=True)
    return Traits(
        text_width=config.text_dim,
        image_width=config.image_dim,
        first_last=config.image_tokens is not None,
        has_addition=addition_in(left_out) is not None,
    )


def _read_text_encoder(path: Path, formats: Collection[str] | None) -> Traits:
    if path.suffix.lower() == ".gguf":
        state_dict, metadata = umt5_gguf_shapes(path), {}
    else:
        state_dict, metadata = read_shapes(path)
    found = _formats(state_dict, metadata)
    state_dict = to_umt5_keys(state_dict | {f"{layer}{MARK}": torch.empty(0) for layer in found})
    _check_formats(state_dict, found, formats)
    shapes = unpacked_shapes(state_dict, found)
    config = umt5_config(shapes)
    check_keys(umt5_shapes(config), shapes)
    if TOKENIZER_KEY not in state_dict:
        tokenizer_beside(path)
    return Traits(text_width=config["d_model"])


def _read_vae(path: Path, formats: Collection[str] | None) -> Traits:
    state_dict = to_wan_vae_keys(read_shapes(path).state_dict)
    dim = vae_dim(state_dict)
    check_keys(_vae_shapes(dim), state_dict)
    return Traits(vae_dim=dim)


def _read_clip_vision(path: Path, formats: Collection[str] | None) -> Traits:
    if path.suffix.lower() not in SAFETENSORS:
        return Traits(refusal="a pickle, which shows nothing without being loaded", foreign=True, unread=True)
    state_dict = read_shapes(path).state_dict
    for width, norm in CLIP_LAYOUTS:
        layers = [number for number in range(VIT_H_LAYERS.stop) if norm.format(number) in state_dict]
        if width in state_dict and len(layers) in VIT_H_LAYERS:
            return Traits(image_width=state_dict[width].shape[-1])
    kind = detect_kind(state_dict)
    return Traits(refusal=f"it is {kind.what if kind else 'something else'}, not a ViT-H", foreign=True)


_READERS: dict[str, Callable[[Path, Collection[str] | None], Traits]] = {
    "model": _read_model,
    "text_encoder": _read_text_encoder,
    "vae": _read_vae,
    "clip_vision": _read_clip_vision,
}


@lru_cache(maxsize=32)
def _model_shapes(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Shape by key of a DiT. Building one of 14B without memory takes 0.2 s."""
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in WanModel(config, nn).state_dict().items()}


@lru_cache(maxsize=32)
def _vae_shapes(dim: int) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in WanVAE(dim=dim).state_dict().items()}


# --- quantised layers ------------------------------------------------------------------------------------


def _formats(state_dict: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Format by layer, as the host reads the marks of a file (`comfy.utils.convert_old_quants`)."""
    if IN_METADATA in metadata:
        found = {layer: str(mark.get("format")) for layer, mark in marks_in(metadata).items()}
    elif any(key.endswith(OLD_MARK) for key in state_dict):
        scales = [key for key in state_dict if key.endswith(OLD_SCALE)]
        found = {key.removesuffix(OLD_SCALE): "float8_e4m3fn" for key in scales}
    else:
        found = {}
    for key, value in state_dict.items():
        if key.endswith(MARK):
            layer = key.removesuffix(MARK)
            found[layer] = str(mark_of(layer, value).get("format"))
    return found


def _check_formats(
    state_dict: Mapping[str, Tensor], found: Mapping[str, str], formats: Collection[str] | None
) -> None:
    """Refuse what the loaders refuse: scales without a format, and formats that this host does not have.

    Raises:
        Refusal: there are some.
    """
    refuse_loose_scales(dict(state_dict) | {f"{layer}{MARK}": torch.empty(0) for layer in found})
    check_scales(state_dict, found)
    unknown = sorted(set(found.values()) - set(formats)) if formats is not None else []
    if unknown:
        raise Refusal(
            f"its weights are stored as {', '.join(unknown)}, and this ComfyUI reads "
            f"{', '.join(sorted(formats or ())) or 'no such format'}",
            "Update ComfyUI with its package comfy-kitchen, or pick another file",
        )
