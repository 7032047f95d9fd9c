"""A step of the whole DiT: its inputs, its work, and the ways to do it. What several sections need."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .bench import PASSES, Bench, Size

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]  # x, timestep, text, CLIP features


def inputs(bench: Bench, size: Size | None = None) -> Inputs:
    """Of both passes: x [2, C, T, h, w] and timestep [2] in float32, text and CLIP features."""
    size = size or bench.size
    config = size.config
    x = bench.random(2, config.in_dim, *size.latent, dtype=torch.float32)
    text = bench.random(2, size.text_tokens, config.text_dim)
    clip = bench.random(2, size.image_tokens, config.image_dim or 0)
    return x, torch.full((2,), 500.0, device=bench.device), text, clip


def tera_operations(size: Size, passes: int = 2) -> float:
    """Multiplications and additions of all blocks of the model it stands for, in 1e12."""
    tokens, dim, context = size.tokens, size.config.dim, size.text_tokens + size.image_tokens
    products = tokens * dim * (6 * dim + 2 * size.config.ffn_dim) + 2 * context * dim * dim
    attention = 2 * tokens * dim * (tokens + context)
    return 2 * (products + attention) * passes * size.layers / 1e12


def one_after_the_other(model: Callable[..., Tensor], given: Inputs) -> Tensor:
    """Both passes, each in a call of its own."""
    return torch.cat([model(*(part[i : i + 1] for part in given)) for i in range(2)])


def joint(model: Any, given: Inputs, **how: Any) -> Tensor:
    """Both passes through each block together, as our sampler asks by default."""
    from wan21.wan.attention import best_kernels

    with best_kernels(given[0].device):
        return model(*given, pass_names=PASSES, **how)


def ways(model: Any, given: Inputs) -> dict[str, Callable[[], Tensor]]:
    """Both passes in three ways, by name; all give the same numbers."""
    from wan21.wan.attention import best_kernels

    def alone(*part: Tensor) -> Tensor:
        with best_kernels(part[0].device):
            return model(*part)

    return {
        "joint": partial(joint, model, given),
        "separate": partial(one_after_the_other, alone, given),
        "stacked": partial(alone, *given),
    }
