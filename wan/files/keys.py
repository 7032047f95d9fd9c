"""From the layouts in which Wan2.1 DiT and VAE weights are published to Wan's own key names.

Renaming only: the tensors are the ones given. Names on the right are those of `wan/modules/model.py` and
`wan/modules/vae.py` of the Wan2.1 release; names on the left are those of diffusers'
`WanTransformer3DModel` and `AutoencoderKLWan`.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..refusal import Refusal
from .bad_file import AGAIN
from .kinds import WAN21_DIT, WAN21_VAE, Kind, detect_kind, not_a
from .limits import FLOATS

# Longest first: of several copies in a file, that below the first of these is read.
DIT_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
VAE_PREFIXES = ("first_stage_model.", "vae.", "model.")
# Ends of keys that each of these has, wherever in a file it lies.
DIT_INSIDE = ("head.modulation", "condition_embedder.time_proj.weight")
VAE_INSIDE = ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma")
# Parts of a whole-pipeline checkpoint; those beside the one asked for are left out.
PIPELINE_PARTS = (
    "model.diffusion_model.", "first_stage_model.", "vae.", "text_encoders.", "text_encoder.",
    "cond_stage_model.", "conditioner.", "clip_vision.",
)  # fmt: skip
MARKER = "model_type."  # WanVideoWrapper's files name the variant in a key that is no weight
QUANTO = "._data"  # keys of optimum-quanto's packed weights end so
QUANTIZATION_SUFFIXES = (
    "scaled_fp8", "scale_weight", "scale_input", "comfy_quant", "weight_scale", "weight_scale_2",
    "input_scale", "pre_quant_scale",
)  # fmt: skip
TWO_A_BYTE = ("nvfp4", "convrot_w4a4")  # formats that keep two neighbours of a row in one byte

# Module names, matched whole from the left and ending at a dot: what follows (.weight, .bias,
# .scale_weight, .lora_A.weight) is kept.
DIT_MODULES = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.image_embedder.norm1": "img_emb.proj.0",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "condition_embedder.image_embedder.norm2": "img_emb.proj.4",
    "condition_embedder.image_embedder.pos_embed": "img_emb.emb_pos",
    "proj_out": "head.head",
    "scale_shift_table": "head.modulation",
}
DIT_BLOCK_MODULES = {
    "scale_shift_table": "modulation",
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "norm2": "norm3",  # the affine norm, before cross-attention; Wan's own norm2 has no weights
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}

VAE_MODULES = {
    "quant_conv": "conv1",
    "post_quant_conv": "conv2",
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}
VAE_RESIDUAL_MODULES = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
MAX_VAE_DIM = 1024
UPSAMPLES_PER_LEVEL = 4  # three residual blocks and a resampler


def is_quantization_key(key: str) -> bool:
    """Whether a key is bookkeeping of a quantised checkpoint (a scale or a marker), not a weight."""
    return key.rpartition(".")[2] in QUANTIZATION_SUFFIXES


def is_readable(key: str, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a weight is of real numbers, or packed into bytes by a layer that says how (`comfy_quant`)."""
    dtype = state_dict[key].dtype
    is_packed = dtype in (torch.uint8, torch.int8) and f"{key.rpartition('.')[0]}.comfy_quant" in state_dict
    return is_packed or dtype in FLOATS


def refuse_quanto(state_dict: dict[str, Tensor]) -> None:
    """Refuses weights that optimum-quanto packed.

    Raises:
        Refusal: there are some.
    """
    if any(key.endswith(QUANTO) for key in state_dict):
        raise Refusal(
            "the weights are in optimum-quanto's format (Wan2GP's quanto_*_int8 files), which is not read "
            "here",
            "Pick the bf16, fp8 or GGUF version of the file",
        )


def refuse_loose_scales(state_dict: dict[str, Tensor]) -> None:
    """Refuses scales that nothing would apply: the weights without them are noise.

    Raises:
        Refusal: layers without a format (`<layer>.comfy_quant`) have scales, as in LightX2V's own fp8 and
            int8 files.
    """
    loose = [key for key in state_dict if key.endswith((".weight_scale", ".scale_weight"))]
    loose = [key for key in loose if f"{key.rpartition('.')[0]}.comfy_quant" not in state_dict]
    if loose:
        raise Refusal(
            f"{len(loose)} layers have scales ({loose[0]}) and nothing says in which format, as in "
            "LightX2V's own files",
            "Pick the file's _comfyui version, or bf16",
        )


def to_wan_dit_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A DiT under the Wan2.1 release's own names (`blocks.0.self_attn.q.weight`, `head.modulation`).

    Read are the release's names and diffusers' (`WanTransformer3DModel`), bare or below any prefix; from a
    whole-pipeline checkpoint, the DiT alone. Scales of quantised layers follow their layer. The tensors are
    those given, uncopied.

    Raises:
        Refusal: the file is recognisably something else, or not known; names it.
    """
    refuse_quanto(state_dict)
    part = select_part(state_dict, DIT_PREFIXES, DIT_INSIDE)
    part = {key: tensor for key, tensor in part.items() if not key.startswith(MARKER)}
    _require(WAN21_DIT, part, state_dict)
    return renamed(part, wan_dit_key)


def wan_dit_key(key: str) -> str:
    """Wan's own name for one DiT key without prefix; whatever follows the module name is kept.

    For example `blocks.3.attn1.to_q.lora_A.weight` -> `blocks.3.self_attn.q.lora_A.weight`. A key that is
    Wan's own, or no layer of the DiT, comes back as it is.
    """
    block = re.match(r"(blocks\.\d+\.)(.*)", key)
    if block:
        return block[1] + replace_module(block[2], DIT_BLOCK_MODULES)
    return replace_module(key, DIT_MODULES)


def to_wan_vae_keys(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A VAE under the Wan2.1 release's own names (`decoder.middle.0.residual.0.gamma`).

    Read are the release's names and diffusers' (`AutoencoderKLWan`), bare or below any prefix; from a
    whole-pipeline checkpoint, the VAE alone. The tensors are those given, uncopied.

    Raises:
        Refusal: the file is another VAE (Wan2.2, SD, SDXL, Flux, TAEHV) or no VAE at all; names it.
    """
    part = select_part(state_dict, VAE_PREFIXES, VAE_INSIDE)
    _require(WAN21_VAE, part, state_dict)
    scales = (".comfy_quant", ".weight_scale", ".scale_weight")
    if key := next((key for key in part if key.endswith(scales)), None):
        raise Refusal(f"its weights are quantised ({key}), and a VAE is read plain", "Pick the bf16 version")
    if "decoder.conv_in.weight" not in part:
        return part
    return renamed(part, _wan_vae_key)


def vae_dim(state_dict: Mapping[str, Tensor]) -> int:
    """Channels of a VAE at its first level, 96 in the release; under the names of `to_wan_vae_keys`.

    Raises:
        Refusal: the layer that shows them is missing or damaged.
    """
    key = "decoder.head.0.gamma"
    if key not in state_dict:
        raise Refusal(f"it lacks {key}: the file is incomplete", AGAIN)
    shape = list(state_dict[key].shape)
    if not shape or not 1 <= shape[0] <= MAX_VAE_DIM or math.prod(shape) != shape[0]:
        raise Refusal(f"{key} has the shape {shape}; 1 to {MAX_VAE_DIM} channels are read", AGAIN)
    return shape[0]


def select_part(
    state_dict: dict[str, Tensor], prefixes: tuple[str, ...], inside: tuple[str, ...]
) -> dict[str, Tensor]:
    """A part of a checkpoint: its keys without the prefix below which it lies.

    Keys of no other part stay as they are, so that a later check can name them.

    Args:
        prefixes: where it mostly lies, and what is stripped from a file that does not have it in whole.
        inside: ends of keys that it has.
    """
    below = {key.removesuffix(end) for key in state_dict for end in inside if key.endswith(end)}
    below = {prefix for prefix in below if not prefix or prefix.endswith(".")}
    usual = [prefix for prefix in (*prefixes, "") if prefix in below]
    begun = [prefix for prefix in prefixes if any(key.startswith(prefix) for key in state_dict)]
    prefix = [*usual, *sorted(below, key=len), *begun, ""][0]
    if not prefix:
        return dict(state_dict)
    part = {k: v for k, v in state_dict.items() if k.startswith(prefix) or not k.startswith(PIPELINE_PARTS)}
    return renamed(part, lambda key: key.removeprefix(prefix))


def _require(expected: Kind, part: dict[str, Tensor], state_dict: dict[str, Tensor]) -> None:
    if detect_kind(part) is not expected:
        raise not_a(expected, state_dict)


def renamed(state_dict: dict[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """The same tensors under new names.

    Raises:
        Refusal: two of them get one name.
    """
    result = {rename(key): tensor for key, tensor in state_dict.items()}
    if len(result) < len(state_dict):
        raise Refusal("the file holds one layer under two names (two layouts mixed)", "Pick another file")
    return result


def replace_module(key: str, modules: dict[str, str]) -> str:
    """A key with the module name that it begins with, up to a dot or the end, replaced."""
    for theirs, ours in modules.items():
        if key == theirs or key.startswith(theirs + "."):
            return ours + key[len(theirs) :]
    return key


def _wan_vae_key(key: str) -> str:
    """Wan's own name for one key of diffusers' AutoencoderKLWan."""
    half, dot, rest = key.partition(".")
    if half not in ("encoder", "decoder"):
        return replace_module(key, VAE_MODULES)
    down = re.match(r"down_blocks\.(\d+)\.(.*)", rest)
    up = re.match(r"up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", rest)
    middle = re.match(r"(mid_block\.resnets\.\d)\.(.*)", rest)
    if down:  # already one flat list of residual blocks and resamplers, as in the release
        return f"encoder.downsamples.{down[1]}.{replace_module(down[2], VAE_RESIDUAL_MODULES)}"
    if up:
        within_level = int(up[3]) if up[2] == "resnets" else UPSAMPLES_PER_LEVEL - 1
        index = UPSAMPLES_PER_LEVEL * int(up[1]) + within_level
        return f"decoder.upsamples.{index}.{replace_module(up[4], VAE_RESIDUAL_MODULES)}"
    if middle:
        return f"{half}.{VAE_MODULES[middle[1]]}.{replace_module(middle[2], VAE_RESIDUAL_MODULES)}"
    return half + dot + replace_module(rest, VAE_MODULES)
