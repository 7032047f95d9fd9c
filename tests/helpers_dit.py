"""A small DiT of each kind, with random weights, and inputs for it."""

import torch
from lib.random_weights import randomise
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel

SMALL = dict(dim=256, ffn_dim=320, num_heads=2, num_layers=3, text_dim=48)
T2V = WanConfig(in_dim=16, **SMALL)
I2V = WanConfig(in_dim=36, image_dim=1280, **SMALL)
FLF = WanConfig(in_dim=36, image_dim=1280, image_tokens=514, **SMALL)
PLAIN_I2V = WanConfig(in_dim=36, **SMALL)
KINDS = {"t2v": T2V, "i2v": I2V, "flf2v": FLF, "i2v-no-clip": PLAIN_I2V}


def ours(config, operations=torch.nn):
    return randomise(WanModel(config, operations))


def inputs(config, frames=3, height=6, width=10, batch=1, seed=1):
    """(x, timestep, text, CLIP features or None)."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, config.in_dim, frames, height, width, generator=g)
    t = torch.linspace(300, 900, batch)
    text = torch.randn(batch, 12, config.text_dim, generator=g)
    tokens = config.image_tokens or 257
    clip = torch.randn(batch, tokens, 1280, generator=g) if config.image_dim else None
    return x, t, text, clip
