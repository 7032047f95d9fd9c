"""What several node tests need besides fixtures."""

import torch


def relative(a, b):
    """Relative error of a against b."""
    return ((a - b).norm() / b.norm()).item()


def clip_vision(tokens=257, seed=0):
    """A CLIP_VISION_OUTPUT as the host's CLIPVisionEncode gives it, with random features."""
    import comfy.clip_vision

    output = comfy.clip_vision.Output()
    g = torch.Generator().manual_seed(seed)
    output.penultimate_hidden_states = torch.randn(1, tokens, 1280, generator=g)
    return output
