"""Our sampling loop inside the host's: models loaded and patched, noise and latent on the device."""

from functools import partial

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch


class _Sampler(comfy.samplers.Sampler):
    """Hands the host's loaded model to `run(predict, noise, latent)` in place of a k-diffusion function."""

    def __init__(self, run):
        self.run = run

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False
    ):
        options = extra_args["model_options"]["transformer_options"]
        return self.run(partial(_predict, guider, options), noise, latent_image)


def _predict(guider, transformer_options, x, timestep, pass_names):
    """Velocity of each pass: all in one walk over the blocks where their contexts have equal shapes."""
    key = {"cond": "positive", "uncond": "negative"}
    inputs = {}
    for name in pass_names:
        conds = guider.conds[key[name]][0]["model_conds"]
        inputs[name] = {k: c.process_cond(batch_size=x.shape[0], area=None).cond for k, c in conds.items()}
    same = all(_shapes(part) == _shapes(inputs[pass_names[0]]) for part in inputs.values())
    velocities = {}
    for group in [pass_names] if same else [(name,) for name in pass_names]:
        count = len(group)
        merged = {k: torch.cat([inputs[name][k] for name in group]) for k in inputs[group[0]]}
        t = torch.full((count * x.shape[0],), timestep, device=x.device)
        options = transformer_options | {
            "cond_or_uncond": [("cond", "uncond").index(name) for name in group],
            "sigmas": t[:1] / 1000,
        }
        v = guider.inner_model.velocity(torch.cat([x] * count), t, options, **merged)
        velocities |= zip(group, v.chunk(count))
    return velocities


def _shapes(part):
    return {k: tuple(v.shape) for k, v in part.items()}


def run_sampling(model, positive, negative, latent_image, batch_index, seed, sigmas, run):
    """Run our sampling loop inside the host's: models loaded and patched, noise and latent on the device.

    Args:
        negative: None when there is no unconditional pass.
        run: `run(predict, noise, latent)` with normalised latents -> normalised latent.

    Returns:
        The latent in the VAE's own space, where the host keeps latents.
    """
    noise = comfy.sample.prepare_noise(latent_image, seed, batch_index)
    guider = comfy.samplers.CFGGuider(model)
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    guider.inner_set_conds(conds)
    samples = guider.sample(noise, latent_image, _Sampler(run), torch.tensor(sigmas), seed=seed)
    management = comfy.model_management
    return samples.to(management.intermediate_device(), management.intermediate_dtype())
