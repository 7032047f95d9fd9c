"""The host's attention as an `AttentionFn`, and the choice between it and the backends of `wan/`."""

from collections.abc import Callable
from functools import partial
from typing import Any

import comfy.model_management
import torch
from comfy.cli_args import args
from comfy.ldm.modules import attention as host_attention
from comfy.ldm.wan import model as host_wan
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..wan.attention import SDPA, Attention, AttentionFn, AttentionSize, sdpa
from ..wan.backends import attentions_to_get, choose_attention, named_attention
from .devices import devices_of
from .untraced import untraced

OVERRIDE = "optimized_attention_override"  # key in transformer_options

EXACT = (  # of the host's
    host_attention.attention_basic,
    host_attention.attention_sub_quad,
    host_attention.attention_split,
    host_attention.attention_pytorch,
    host_attention.attention_xformers,
    host_attention.attention_flash,
)
SUB_QUADRATIC = "the host's sub-quadratic attention"
_told: set[torch.device] = set()  # of which a report has said what a missing package would give


def has_own_attention(transformer_options: dict) -> bool:
    """Whether another pack or the host's start options name an attention other than PyTorch's."""
    plain: list[Callable] = [host_attention.attention_pytorch]
    if comfy.model_management.get_torch_device().type == "cpu":
        plain.append(host_attention.attention_sub_quad)
    overridden = OVERRIDE in transformer_options
    return overridden or host_wan.optimized_attention not in plain


@untraced
def attention_of(transformer_options: dict) -> AttentionFn:
    """The attention the user chose for the host: what its own Wan model calls, where some packs put theirs.

    On the CPU, where the host would take its sub-quadratic default, plain SDPA is as exact and several times
    faster. On a device where the host takes it, SDPA has no kernel that spares the matrix of all scores.
    """
    if not has_own_attention(transformer_options):
        return sdpa
    return _of_the_host(host_wan.optimized_attention, transformer_options=transformer_options)


def _of_the_host(function: Callable, **options: Any) -> AttentionFn:
    """An attention of the host's, which takes [B, L, N*D] and the number of heads."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[2]
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        return function(q, k, v, heads, **options).unflatten(-1, (heads, -1))

    return attention


def choose_attention_for(model: ModelPatcher, name: str, tokens: int) -> Attention | None:
    """The sampler's attention for a MODEL of ours, on all its devices; None for the host's own choice.

    Args:
        name: of `wan.backends.CHOICES`; auto keeps to what the host was started with, and is sdpa where
            another would serve some of the devices only.
        tokens: of a sample, in a pass of the run.

    Raises:
        Refusal: an explicit choice cannot be had.
    """
    if name == "auto" and has_own_attention(model.model_options["transformer_options"]):
        return None
    if name == "auto" and args.use_pytorch_cross_attention:
        name = "sdpa"
    if model.model.diffusion_model.elsewhere is not None:  # the GPU here may be a worker's
        return SDPA if name == "auto" else attention_named(model, name)
    config, dtype = model.model.diffusion_model.config, model.model.get_dtype_inference()
    size = AttentionSize(tokens, config.num_heads, config.head_dim)
    chosen = [
        choose_attention(name, device, dtype, size, _barred(), partial(_make_room, device))
        for device in devices_of(model)
    ]
    return chosen[0] if len({(one.name, one.kernel) for one in chosen}) == 1 else SDPA


def _make_room(device: torch.device, need: float) -> None:
    comfy.model_management.free_memory(need, device)


def attention_to_get(model: ModelPatcher, chosen: Attention | None) -> str:
    """What an attention that is not installed would give on a MODEL's device; told once a process."""
    device = model.load_device
    if chosen is None or device in _told:
        return ""
    head_dim = model.model.diffusion_model.config.head_dim
    told = attentions_to_get(chosen, device, model.model.get_dtype_inference(), head_dim, _barred())
    if told:
        _told.add(device)
    return told


def attention_named(model: ModelPatcher, name: str) -> Attention:
    """The attention that another process calls so, for a MODEL of ours here.

    Raises:
        Refusal: it cannot be had here.
    """
    if name == SUB_QUADRATIC:
        return Attention(name, _of_the_host(host_attention.attention_sub_quad))
    dtype, head_dim = model.model.get_dtype_inference(), model.model.diffusion_model.config.head_dim
    return named_attention(name, model.load_device, dtype, head_dim, _barred())


def _barred() -> dict[str, str]:
    return {"xformers": "ComfyUI was started with --disable-xformers"} if args.disable_xformers else {}


def unused_override(model: ModelPatcher, attention: Attention | None) -> str | None:
    """A sentence where another pack's attention on a MODEL gives way to the sampler's own choice."""
    if attention is None or OVERRIDE not in model.model_options["transformer_options"]:
        return None
    return (
        f"{OVERRIDE} set on the MODEL by another node is not used here: execution.attention is "
        f"{attention.name} (auto would take it)"
    )


def retry_of(model: ModelPatcher, attention: Attention | None) -> Attention | None:
    """What a step that gave NaN is done again with; None where its attention is exact, and not the cause.

    Args:
        attention: as from `choose_attention_for`. The host's own choice is taken for quantised where it is
            SageAttention, or another pack's: set on the MODEL, or in the place of the host's for all models.
    """
    if attention is None:
        overridden = OVERRIDE in model.model_options["transformer_options"]
        quantised = overridden or host_wan.optimized_attention not in EXACT
    else:
        quantised = attention.quantised
    if not quantised:
        return None
    if model.load_device.type == "cpu" or comfy.model_management.pytorch_attention_enabled():
        return SDPA
    # SDPA would make the matrix of all scores: 86 GB for 81 frames of 832x480 and 40 heads.
    return Attention(SUB_QUADRATIC, _of_the_host(host_attention.attention_sub_quad))
