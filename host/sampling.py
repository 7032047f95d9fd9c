"""Our sampling loop inside the host's: models loaded and patched, noise and latent on the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import torch
from comfy.k_diffusion import sampling as k_diffusion
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..wan.inpaint import Kept
from ..wan.option import Call
from ..wan.solvers import NoiseSampler
from .devices import OnDevices
from .memory import make_room, tell_out_of_memory
from .model import CALL, NEED, TEXTS
from .patches import refuse_compiled_fp8
from .progress import check_cancelled


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job as the host is given it.

    Attributes:
        positive: CONDITIONING.
        negative: CONDITIONING, or None when nothing reads it.
        sigmas: the schedule, one more than steps.
        adds_noise: whether noise is added to the latent at the start.
        need: bytes of a step beside the weights, for which the host makes room; None for its own guess.
    """

    positive: list
    negative: list | None
    sigmas: list[float]
    adds_noise: bool = True
    need: int | None = None


class HostDenoiser:
    """A `wan.option.Denoiser` over a model that the host has loaded, and its prepared conditioning."""

    def __init__(self, patcher: ModelPatcher, conds: dict[str, list[dict]], transformer_options: dict):
        self.patcher = patcher
        self.conds = conds
        self.model: Any = patcher.model
        self.config = self.model.diffusion_model.config
        self.transformer_options = transformer_options
        self.device: torch.device = patcher.load_device

    @property
    def computed(self) -> dict[str, torch.device]:
        """As of `OnDevices`: there is one."""
        return {}

    def embed_time(self, timesteps: list[float]) -> Tensor:
        return self.model.diffusion_model.embed_time(torch.tensor(timesteps, device=self.device))

    def make_room(self) -> bool:
        """Lets go of what the device holds beside a step; False: there was nothing left."""
        elsewhere = self.model.diffusion_model.elsewhere
        return make_room(self.patcher) if elsewhere is None else elsewhere.make_room(check_cancelled)

    def predict(self, x: Tensor, timestep: float, call: Call) -> dict[str, Tensor]:
        """The velocity of each pass: jointly where that is asked for and their contexts have equal shapes."""
        with tell_out_of_memory():
            return self._predict(x, timestep, call)

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
                TEXTS: {name: self._text(name, x.shape[0]) for name in call.contexts if name not in group},
            }
            v = self.model.velocity(torch.cat([x] * count), t, options, **merged)
            velocities |= zip(group, v.chunk(count))
        return velocities

    def _text(self, name, batch_size):
        return self._inputs(name, batch_size)["c_crossattn"]

    def _inputs(self, name, batch_size):
        conds = self.conds[{"cond": "positive", "uncond": "negative"}[name]][0]["model_conds"]
        return {k: c.process_cond(batch_size=batch_size, area=None).cond for k, c in conds.items()}


def _shapes(part):
    return {k: tuple(v.shape) for k, v in part.items()}


def _denoiser(guider: comfy.samplers.CFGGuider, transformer_options: dict) -> HostDenoiser | OnDevices:
    """Over the guider's model, and its copies on further devices if there are any."""
    copies = guider.model_options.get("multigpu_clones")
    if not copies:
        return HostDenoiser(guider.model_patcher, guider.conds, transformer_options)
    denoisers = []
    for device, patcher in copies.items():
        options = comfy.patcher_extension.copy_nested_dicts(transformer_options)
        comfy.samplers.cast_transformer_options(options, device=device)
        denoisers.append(HostDenoiser(patcher, guider.conds, options))
    pool: Any = guider.model_options["multigpu_thread_pool"]
    return OnDevices(denoisers, pool)


Run = Callable[[HostDenoiser | OnDevices, Tensor, Tensor, Kept | None], tuple[Tensor, Any]]


class _Sampler(comfy.samplers.Sampler):
    """Hands the host's loaded model to `run` in place of a k-diffusion function."""

    def __init__(self, run: Run):
        self.run = run
        self.beside: Any = None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image, denoise_mask=None, disable_pbar=False
    ):
        options = extra_args["model_options"]["transformer_options"]
        denoiser = _denoiser(guider, options)
        kept = None
        if denoise_mask is not None:
            mask = _mask_by_sigma(guider, sigmas, denoise_mask, extra_args["model_options"])
            kept = Kept(latent_image, noise, mask)
        samples, self.beside = self.run(denoiser, noise, latent_image, kept)
        # A latent that keeps noise is handed on in the host's way: the next sampler scales it by 1 - sigma.
        return guider.inner_model.model_sampling.inverse_noise_scaling(sigmas[-1], samples)


def _mask_by_sigma(guider, sigmas, mask, model_options) -> Callable[[float], Tensor]:
    """The noise mask at a noise level: another one where a node such as DifferentialDiffusion makes it."""
    change = model_options.get("denoise_mask_function")
    if change is None:
        return lambda sigma: mask
    told = {"model": guider, "sigmas": sigmas}
    return lambda sigma: change(sigmas.new_full((mask.shape[0],), sigma), mask, extra_options=told)


def as_video_latent(model: ModelPatcher, latent: dict) -> tuple[dict, str | None]:
    """A LATENT as the host's samplers take it: an empty one of another kind, or a picture's, is made ours.

    Returns:
        (LATENT, a sentence if it was changed)
    """
    samples = latent["samples"]
    ratios = (latent.get(f"downscale_ratio_{axis}") for axis in ("spacial", "temporal"))
    fitted = comfy.sample.fix_empty_latent_channels(model, samples, *ratios)
    if fitted.shape == samples.shape:
        return latent, None
    said = f"the latent {list(samples.shape)} of another kind is taken as {list(fitted.shape)}"
    return latent | {"samples": fitted}, said


def fresh_noise(solver: str, like: Tensor, sigmas: list[float], seed: int) -> NoiseSampler | None:
    """The noise that a solver adds on the way: the host's own, of the same seed."""
    if solver == "lcm":
        return k_diffusion.default_noise_sampler(like, seed=seed)
    if solver == "dpm++_sde":
        low, high = min(sigma for sigma in sigmas if sigma > 0), max(sigmas)
        tree: Any = k_diffusion.BrownianTreeNoiseSampler(like, low, high, seed=seed, cpu=True)
        return lambda sigma, sigma_next: tree(torch.tensor(sigma), torch.tensor(sigma_next))
    return None


def sigma_below_one(model: ModelPatcher) -> float:
    """What the host's stochastic solvers take for a first sigma of 1."""
    model_sampling: Any = model.get_model_object("model_sampling")
    return float(model_sampling.percent_to_sigma(1e-4))


def run_sampling(
    model: ModelPatcher, prepared: Prepared, latent: dict, seed: int, run: Run
) -> tuple[Tensor, Any]:
    """Runs our sampling loop inside the host's.

    Args:
        model: a MODEL of ours.
        prepared: the job.
        latent: LATENT to start from, and for the shape of the noise; where it has a noise mask, this part
            alone is sampled.
        seed: of the noise.
        run: `run(denoiser, noise, latent, kept)` -> samples and anything beside; latents are normalised.

    Returns:
        The samples in the VAE's own space, where the host keeps latents, and what `run` gave beside them.

    Raises:
        Refusal: the device cannot run the MODEL as it was compiled.
    """
    refuse_compiled_fp8(model)
    samples = latent["samples"]
    noise = torch.zeros_like(samples)
    if prepared.adds_noise:
        noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    guider = comfy.samplers.CFGGuider(model)
    positive = prepared.positive
    if prepared.need is not None:
        positive = [[text, options | {NEED: prepared.need}] for text, options in positive]
    conds = {"positive": positive}
    if prepared.negative is not None:
        conds["negative"] = prepared.negative
    guider.inner_set_conds(conds)
    sampler = _Sampler(run)
    mask = latent.get("noise_mask")
    samples = guider.sample(
        noise, samples, sampler, torch.tensor(prepared.sigmas), denoise_mask=mask, seed=seed
    )
    management = comfy.model_management
    samples = samples.to(management.intermediate_device(), management.intermediate_dtype())
    return samples, sampler.beside
