"""Clips and latents for the VAE."""

import torch


def pixels(frames, h=24, w=40, batch=1):
    return torch.rand(batch, 3, frames, h, w, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def latents(frames, h=3, w=5, batch=1):
    return torch.randn(batch, 16, frames, h, w, generator=torch.Generator().manual_seed(frames))
