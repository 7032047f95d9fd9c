"""The tiny DiT: sizes, initial weights, and one velocity as the sampler asks for it.

B clips    T latent frames    h w latent size    D width of the text features
"""

import torch
import torch.nn.functional as F

from ..wan.config import PATCH_SIZE, WanConfig
from ..wan.dit import WanModel
from .text import CONFIG as TEXT_CONFIG
from .text import PaddedTextAttention

CONFIG = WanConfig(
    in_dim=36,
    dim=256,
    ffn_dim=1024,
    num_heads=2,
    num_layers=6,
    text_dim=TEXT_CONFIG["d_model"],
    image_dim=1280,
)
# The branch of the CLIP features is there, so that every graph runs, and is silent: its values are zero.
UNUSED = ("img_emb.", ".k_img.", ".v_img.", ".norm_k_img.")


def build(seed=0):
    """A fresh `WanModel`; the parameters that are not trained have no gradient."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = WanModel(CONFIG, torch.nn)
        for name, parameter in model.named_parameters():
            initialise(name, parameter)
        prefer_words(model)
    return model


@torch.no_grad()
def initialise(name, parameter):
    """Activations near one, residual branches small, an output of zero: the first velocity is 0."""
    if any(part in name for part in UNUSED):
        parameter.requires_grad_(False)
        parameter.fill_(1.0 if parameter.ndim == 1 and is_norm(name) and name.endswith("weight") else 0.0)
    elif name.startswith("head.") or name.endswith("bias"):
        parameter.zero_()
    elif name.endswith("modulation"):
        parameter.zero_()
        parameter[:, 2::3] = 0.3  # the gates
    elif parameter.ndim == 1:
        parameter.fill_(1.0)
    else:
        std = parameter[0].numel() ** -0.5
        if name.startswith("time_projection"):
            std *= 0.2
        parameter.normal_(std=std)


@torch.no_grad()
def prefer_words(model, level=1.5, key=2.0, query=6.0):
    """Start with words that outweigh the padding of a prompt.

    The host pads every prompt to 512 tokens, and with random keys a caption of five words gets one percent
    of the attention: for thousands of steps the model hardly learns that there is a caption. So one channel
    of the embedded text says "word" (`level`) or "pad" (-`level`), by the mean of a GELU, and one channel of
    each head reads it.
    """
    layer = model.text_embedding[2]
    layer.weight[0] = 2 * level / (layer.in_features * 0.28)  # 0.28: the mean of GELU over a unit normal
    layer.bias[0] = -level
    for block in model.blocks:
        attention = block.cross_attn
        for row in range(0, model.config.dim, model.config.dim // model.config.num_heads):
            attention.k.weight[row] = 0
            attention.k.weight[row, 0] = key
            attention.q.bias[row] = query


def is_norm(name):
    """`proj.0` and `proj.4` are the image branch's LayerNorms."""
    return "norm" in name or ".proj.0." in name or ".proj.4." in name


def velocity(model, x, sigma, condition, features, lengths):
    """What the model takes for noise minus clip.

    Args:
        x: noisy latents [B, 16, T, h, w].
        sigma: [B] in [0, 1].
        condition: mask and image latent [B, 4 + 16, T, h, w].
        features, lengths: of the prompts, from `TextEncoder`.
    """
    grid = [n // p for n, p in zip(x.shape[2:], PATCH_SIZE)]
    if features.shape[1] == grid[0] * grid[1] * grid[2]:  # cross-attention is told by its length
        features = F.pad(features, (0, 0, 0, 1))
    attention = PaddedTextAttention(lengths, features.shape[1])
    return model(torch.cat([x, condition], 1), 1000 * sigma, features, attention=attention)
