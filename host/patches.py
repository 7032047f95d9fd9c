"""What other nodes put on a MODEL: what our DiT and our sampler honour, refuse or leave out."""

import re
from collections.abc import Callable, Iterator
from inspect import signature
from types import FunctionType
from typing import Any

import comfy.ldm.wan.model
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, get_all_wrappers
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from torch import Tensor, nn

from ..wan.dit import WanAttentionBlock, WanCrossAttention, WanSelfAttention
from ..wan.files.bad_file import listed
from ..wan.refusal import Refusal
from ..wan.rope import axis_frequencies
from .stored import kept_dtype
from .untraced import untraced_below

# Functions inside a block: our blocks have no place for them. Whole blocks can be replaced (`runner_of`).
INSIDE_BLOCKS = ("attn1_patch", "attn2_patch", "double_block")
# Entries of model_options and kinds of wrappers that act around the host's own step, which ours is not.
AROUND_HOST_STEPS = (
    "sampler_cfg_function",
    "sampler_post_cfg_function",
    "sampler_pre_cfg_function",
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
)
OF_HOST_STEPS = ("apply_model", "_apply_model", "scale_latent_inpaint")  # functions of the model below
# What the host's Wan2.1 consists of.
HOST_CLASSES = (
    "WanModel",
    "WanAttentionBlock",
    "WanSelfAttention",
    "WanT2VCrossAttention",
    "WanI2VCrossAttention",
    "MLPProj",
    "Head",
)
WRAPPERS_OF_HOST_STEPS = (WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH)


def patch_inside_blocks(transformer_options: dict) -> Refusal | None:
    """The refusal of functions inside the blocks, or None without any."""
    patches = transformer_options.get("patches", {})
    names = [name for name in INSIDE_BLOCKS if patches.get(name)]
    if not names:
        return None
    return Refusal(
        f"another node put {' and '.join(names)} on the MODEL, which acts inside the blocks of a model",
        "Remove that node, or load the model with the host's Load Diffusion Model",
    )


# What our DiT calls in the form in which the host's Wan model calls it: a replacement acts. All else below
# `diffusion_model` is called in another form (both attentions, blocks, head), or not at all (forward_orig).
_ACTS = re.compile(
    r"(forward|_forward"
    r"|(patch_embedding|text_embedding|time_embedding|time_projection|img_emb)(\..+)?"
    r"|blocks\.\d+(\.modulation|\.(ffn|norm3)(\..+)?"
    r"|\.(self_attn|cross_attn)\.(q|k|v|o|norm_q|norm_k|k_img|v_img|norm_k_img)(\..+)?)"
    r"|head\.(head(\..+)?|modulation))"
)
CALLED = ("forward", "_forward")
# How many inputs a block and its cross-attention are given by position.
BLOCK_INPUTS, CROSS_INPUTS = 7, 5
_INSTEAD = (
    (r"forward_orig", "for a cache over the steps set cache to teacache on Wan21Sampler"),
    (r"rope_embedder|rope_encode", "set riflex on Wan21Sampler in place of the pack's RIFLEx"),
    (r"blocks\.\d+\.self_attn\.forward", "choose attention on Wan21Sampler for another attention kernel"),
    (r"blocks\.\d+\.cross_attn\.forward", "set nag on Wan21Sampler in place of the pack's NAG"),
)


def replaced_inside(model: ModelPatcher) -> Refusal | None:
    """The refusal of parts below `diffusion_model` that a node replaced and that our DiT would not call."""
    paths = [
        key.removeprefix("diffusion_model.")
        for key in model.object_patches
        if "." in key and key.startswith("diffusion_model.")
    ]
    unread = [path for path in paths if not _acts(model, path)]
    return _would_not_act("replaced", unread) or written_inside(model.model.diffusion_model)


def _would_not_act(done: str, paths: list[str]) -> Refusal | None:
    if not paths:
        return None
    instead = next((f", or {fix}" for pattern, fix in _INSTEAD if re.fullmatch(pattern, paths[0])), "")
    return Refusal(
        f"another node {done} {listed((f'diffusion_model.{path}' for path in paths), 3)}, which this "
        "MODEL does not call in the host's form, so that it would not act",
        f"Remove that node{instead}; or load the model with the host's Load Diffusion Model",
    )


def written_inside(dit: nn.Module) -> Refusal | None:
    """The refusal of functions and hooks that a node put on the model itself, past the host's patches.

    Args:
        dit: of ours.
    """
    dit = _plain(dit)
    blocks = [_plain(block) for block in dit.get_submodule("blocks").children()]
    written = [f"blocks.{i}{path}" for i, block in enumerate(blocks) for path in _written_on(block)]
    own = [i for i, block in enumerate(blocks) if isinstance(block, WanAttentionBlock)]
    hooked = [f"blocks.{i}.self_attn" for i in own if has_hooks(blocks[i].get_submodule("self_attn"))]
    return _would_not_act("replaced", [*_written_on_model(dit), *written]) or _would_not_act("hooked", hooked)


@untraced_below
def written_in_call(dit: nn.Module) -> Refusal | None:
    """The refusal of functions that a node put on the model for the time of one call of it.

    Args:
        dit: of ours.
    """
    return _would_not_act("replaced", _functions_on(dit))


def _plain(part: Any) -> Any:
    """What torch.compile wraps, or a part as it is."""
    return getattr(part, "_orig_mod", part)


def _written_on_model(dit: nn.Module) -> list[str]:
    return [*_functions_on(dit), *(["__class__"] if type(dit) is not dit.built_as else [])]


def _written_on(block: nn.Module) -> Iterator[str]:
    """What of a block is not called in the form in which a node wrote it, as ".cross_attn.forward"."""
    if not _is_called(block, WanAttentionBlock, BLOCK_INPUTS):
        yield ".forward"
    if not isinstance(block, WanAttentionBlock):  # another's, called whole
        return
    attention, cross = _plain(block.self_attn), _plain(block.cross_attn)
    if "forward" in vars(attention) or type(attention) is not WanSelfAttention:  # gives queries, keys, values
        yield ".self_attn.forward"
    if not _is_called(cross, WanCrossAttention, CROSS_INPUTS):
        yield ".cross_attn.forward"
    for name, part in (("", block), (".self_attn", attention), (".cross_attn", cross)):
        yield from (f"{name}.{path}" for path in _functions_on(part))
    yield from (f".{name}" for name in block._modules if name in ("norm1", "norm2"))  # the host's, not ours


def _is_called(part: nn.Module, kind: type, inputs: int) -> bool:
    """Whether a part is ours, or one that takes as many inputs by position as ours does."""
    is_ours = type(part) is kind and "forward" not in vars(part)
    return is_ours or _takes(part.forward, inputs)


def _takes(function: Callable, inputs: int) -> bool:
    try:
        signature(function).bind(*range(inputs))
    except TypeError:
        return False
    return True


def _functions_on(part: nn.Module) -> list[str]:
    """Names of functions that a part has beside those of its class, which the host puts back after a run."""
    return [
        name
        for name, value in vars(part).items()
        if callable(value)
        and not isinstance(value, (type, nn.Module))
        and name not in CALLED
        and getattr(value, "__func__", value) is not getattr(type(part), name, None)
    ]


def has_hooks(part: nn.Module) -> bool:
    """Whether a part has hooks of torch's around its call."""
    return bool(part._forward_hooks or part._forward_pre_hooks)


def _acts(model: ModelPatcher, path: str) -> bool:
    compiled = hasattr(model.object_patches[f"diffusion_model.{path}"], "_orig_mod")  # by torch.compile
    return compiled or _ACTS.fullmatch(path) is not None


def refused_patch(model: ModelPatcher) -> Refusal | None:
    """The refusal of what would make our sampler's result wrong, or None."""
    options = model.model_options
    if "easycache" in options["transformer_options"]:
        return Refusal(
            "the MODEL carries EasyCache or LazyCache, which acts on the host's own steps",
            "Remove it and set cache to teacache, or sample with the host's KSampler",
        )
    if options.get("context_handler") is not None:
        return Refusal(
            "the MODEL carries Context Windows, which act on the host's own steps",
            "Remove them, or sample with the host's KSampler",
        )
    return replaced_inside(model) or patch_inside_blocks(options["transformer_options"])


def refuse_compiled_fp8(model: ModelPatcher) -> None:
    """Refuses code that the device's compiler cannot make.

    Raises:
        Refusal: the MODEL is compiled for an NVIDIA GPU below 8.9 with weights in float8_e4m3fn.
    """
    compiled = model.model_options.get(TORCH_COMPILE_KWARGS)
    if not compiled or compiled["backend"] != "inductor" or model.load_device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(model.load_device)
    if not comfy.model_management.is_nvidia() or capability >= (8, 9):
        return
    layers = [x for x in model.model.diffusion_model.modules() if getattr(x, "weight", None) is not None]
    if any(kept_dtype(layer, "weight") == torch.float8_e4m3fn for layer in layers):
        raise Refusal(
            f"the MODEL is compiled and its weights are fp8_e4m3fn, which torch.compile cannot convert on a "
            f"GPU of compute capability {capability[0]}.{capability[1]} (it takes 8.9: RTX 40, L4, H100)",
            "Remove TorchCompileModel, or set weight_dtype to fp8_e5m2 or bf16 (of a file that is not fp8)",
        )


def ignored_patches(model: ModelPatcher) -> list[str]:
    """What other nodes put on the MODEL that our sampler's own steps do not pass through."""
    names = [key for key in AROUND_HOST_STEPS if model.model_options.get(key)]
    for kind in WRAPPERS_OF_HOST_STEPS:
        there = any(model.wrappers.get(kind, {}).values())
        if there or get_all_wrappers(kind, model.model_options, is_model_options=True):
            names.append(f"a {kind} wrapper")
    written = {*model.object_patches, *_functions_on(model.model)}
    names += [name for name in OF_HOST_STEPS if name in written]
    if "model_sampling" in model.object_patches:
        names.append("ModelSampling (its shift)")
    return names


def changed_in_host() -> list[str]:
    """A sentence on what packs changed in the host's own Wan classes, for all its models and not for ours."""
    module: Any = comfy.ldm.wan.model
    kinds = {name: getattr(module, name) for name in HOST_CLASSES}
    names = [name for name, kind in kinds.items() if kind.__module__ != module.__name__]
    names += [
        f"{name}.{function}"
        for name, kind in kinds.items()
        for function, value in vars(kind).items()
        if isinstance(value, FunctionType) and value.__code__.co_filename != module.__file__
    ]
    if not names:
        return []
    return [
        f"another pack changed {listed(names)} of ComfyUI's own Wan model for all graphs; this MODEL is of "
        "another class, on which that has no effect"
    ]


def scaled_frequencies(
    frequencies: tuple[Tensor, ...] | None, head_dim: int, transformer_options: dict
) -> tuple[Tensor, ...] | None:
    """The host's ScaleROPE: its scales stretch an axis; its shifts cancel, since RoPE sees differences only.

    Args:
        frequencies: of the three axes, or None for the model's own.
    """
    rope = transformer_options.get("rope_options")
    if not rope:
        return frequencies
    scales = (rope.get(f"scale_{axis}", 1.0) for axis in "tyx")
    return tuple(f * scale for f, scale in zip(frequencies or axis_frequencies(head_dim), scales))
