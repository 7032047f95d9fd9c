"""Our sampling loop inside the host's: models loaded and patched, noise and latent on the device."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import torch

from .memory import make_room, tell_out_of_memory
from .model import CALL, NEED
from .patches import refuse_compiled_fp8


class _Sampler(comfy.samplers.Sampler):
    """Hands the host's loaded model to `run(denoiser, noise, latent)` in place of a k-diffusion function."""

    def __init__(self, run):
        self.run = run

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False
    ):
        options = extra_args["model_options"]["transformer_options"]
        return self.run(_Denoiser(guider, options, noise.device), noise, latent_image)


class _Denoiser:
    """`wan.sample.Denoiser` over the host's loaded model and its prepared conditioning."""

    def __init__(self, guider, transformer_options, device):
        self.patcher = guider.model_patcher
        self.conds = guider.conds
        self.model = guider.inner_model
        self.config = self.model.diffusion_model.config
        self.transformer_options = transformer_options
        self.device = device

    def embed_time(self, timesteps):
        return self.model.diffusion_model.embed_time(torch.tensor(timesteps, device=self.device))

    def predict(self, x, timestep, call):
        """Velocity of each pass: jointly where that is asked for and their contexts have equal shapes."""
        with tell_out_of_memory():
            return self._predict(x, timestep, call)

    def make_room(self):
        return make_room(self.patcher)

    def _predict(self, x, timestep, call):
        inputs = {name: self._inputs(name, x.shape[0]) for name in call.pass_names}
        same = all(_shapes(part) == _shapes(inputs[call.pass_names[0]]) for part in inputs.values())
        velocities = {}
        for group in [call.pass_names] if same and call.plan.joint else [(name,) for name in call.pass_names]:
            count = len(group)
            merged = {k: torch.cat([inputs[name][k] for name in group]) for k in inputs[group[0]]}
            t = torch.full((count * x.shape[0],), timestep, device=x.device)
            options = self.transformer_options | {
                "cond_or_uncond": [("cond", "uncond").index(name) for name in group],
                "sigmas": t[:1] / 1000,
                CALL: call,
            }
            v = self.model.velocity(torch.cat([x] * count), t, options, **merged)
            velocities |= zip(group, v.chunk(count))
        return velocities

    def _inputs(self, name, batch_size):
        conds = self.conds[{"cond": "positive", "uncond": "negative"}[name]][0]["model_conds"]
        return {k: c.process_cond(batch_size=batch_size, area=None).cond for k, c in conds.items()}


def _shapes(part):
    return {k: tuple(v.shape) for k, v in part.items()}


def run_sampling(model, positive, negative, latent_image, batch_index, seed, sigmas, run, need=None):
    """Run our sampling loop inside the host's: models loaded and patched, noise and latent on the device.

    Args:
        negative: None when there is no unconditional pass.
        run: `run(denoiser, noise, latent)` -> latent: a `wan.sample.Denoiser`; latents are normalised.
        need: bytes a step takes beside the weights, for which the host makes room; None for its own guess.

    Raises:
        Refusal: the device cannot run the MODEL as it was compiled.

    Returns:
        The latent in the VAE's own space, where the host keeps latents.
    """
    refuse_compiled_fp8(model)
    noise = comfy.sample.prepare_noise(latent_image, seed, batch_index)
    guider = comfy.samplers.CFGGuider(model)
    if need is not None:
        positive = [[text, options | {NEED: need}] for text, options in positive]
    conds = {"positive": positive} if negative is None else {"positive": positive, "negative": negative}
    guider.inner_set_conds(conds)
    samples = guider.sample(noise, latent_image, _Sampler(run), torch.tensor(sigmas), seed=seed)
    management = comfy.model_management
    return samples.to(management.intermediate_device(), management.intermediate_dtype())
