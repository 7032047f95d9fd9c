"""The host's attention as an `AttentionFn`, and the choice between it and the backends of `wan/`."""

from collections.abc import Callable

import comfy.model_management
from comfy.ldm.modules import attention as host_attention
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..wan.attention import Attention, AttentionFn, choose_attention, sdpa
from .runner import untraced


def has_own_attention(transformer_options: dict) -> bool:
    """Whether another pack or the host's start options name an attention other than PyTorch's."""
    plain: list[Callable] = [host_attention.attention_pytorch]
    if comfy.model_management.get_torch_device().type == "cpu":
        plain.append(host_attention.attention_sub_quad)
    overridden = "optimized_attention_override" in transformer_options
    return overridden or host_attention.optimized_attention not in plain


@untraced
def attention_of(transformer_options: dict) -> AttentionFn:
    """The attention the user chose for the host.

    On the CPU, where the host would take its sub-quadratic default, plain SDPA is as exact and several times
    faster. On a device where the host takes it, SDPA has no kernel that spares the matrix of all scores.
    """
    if not has_own_attention(transformer_options):
        return sdpa
    chosen = host_attention.optimized_attention

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.shape[2]
        q, k, v = q.flatten(2), k.flatten(2), v.flatten(2)
        return chosen(q, k, v, heads, transformer_options=transformer_options).unflatten(-1, (heads, -1))

    return attention


def choose_attention_for(model: ModelPatcher, name: str) -> Attention | None:
    """The sampler's attention for a MODEL of ours; None for the host's own choice.

    Args:
        name: of `wan.attention.CHOICES`.

    Raises:
        Refusal: an explicit choice cannot be had.
    """
    if name == "auto" and has_own_attention(model.model_options["transformer_options"]):
        return None
    dtype = model.model.get_dtype_inference()
    return choose_attention(name, model.load_device, dtype, model.model.diffusion_model.config.head_dim)
