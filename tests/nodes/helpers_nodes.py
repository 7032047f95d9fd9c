"""What several node tests need besides fixtures."""

import torch


def clip_vision(tokens=257, seed=0):
    """A CLIP_VISION_OUTPUT as the host's CLIPVisionEncode gives it, with random features."""
    import comfy.clip_vision

    output = comfy.clip_vision.Output()
    g = torch.Generator().manual_seed(seed)
    output.penultimate_hidden_states = torch.randn(1, tokens, 1280, generator=g)
    return output


def host_euler(model, positive, negative, latent, sigmas, cfg, seed):
    """The host's own Euler over the same sigmas."""
    import comfy.sample
    import comfy.samplers

    samples = latent["samples"]
    return comfy.sample.sample_custom(
        model, comfy.sample.prepare_noise(samples, seed), cfg, comfy.samplers.sampler_object("euler"),
        torch.tensor(sigmas), positive, negative, samples, seed=seed, disable_pbar=True,
    )  # fmt: skip
