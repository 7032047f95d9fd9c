"""The end image as a latent of its own behind the video: a guide for the model, and no frame of the result.

Conditioning says so, because it reaches every sampler; a LATENT's own keys get lost in other nodes.
"""

from collections.abc import Mapping
from typing import Any

import comfy.sampler_helpers
import comfy.utils
import torch
from torch import Tensor

GUIDE = "wan21_guide"  # key in a conditioning, True: its last image latent is such a guide


def with_guide(latent: dict, conditioning: list) -> dict:
    """A LATENT with the guide of a CONDITIONING as its last frame, where it has one frame too few for it."""
    guide = _missing_guide(latent["samples"], conditioning[0][1] if conditioning else {})
    if guide is None:
        return latent
    samples = latent["samples"]
    whole = latent | {"samples": torch.cat([samples, guide], dim=2)}
    if "noise_mask" in latent:
        mask = comfy.sampler_helpers.prepare_mask(latent["noise_mask"], samples.shape, samples.device)
        whole["noise_mask"] = _with_ones(mask)
    return whole


def has_guide(conditioning: list) -> bool:
    """Whether a CONDITIONING ends in such a guide."""
    return bool(conditioning) and bool(conditioning[0][1].get(GUIDE))


def sample_with_guide(
    executor: Any,
    noise: Tensor,
    latent_image: Tensor,
    sampler: Any,
    sigmas: Tensor,
    denoise_mask: Tensor | None = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """A wrapper of the host's samplers: a MODEL of ours is given the guide, and a clean result is without it.

    A run that leaves noise over keeps it, for the run that goes on from there.
    """
    conds = (options for entries in executor.class_obj.conds.values() for options in entries)
    options = next((options for options in conds if options.get(GUIDE)), None)
    guide = None if options is None else _missing_guide(latent_image, options)
    if guide is not None:
        latent_image = torch.cat([latent_image, guide], dim=2)
        noise = torch.cat([noise, _noise_like(guide, noise, seed)], dim=2)
        denoise_mask = None if denoise_mask is None else _with_ones(denoise_mask)
        kwargs["latent_shapes"] = [latent_image.shape]
    is_dropped = options is not None and not sigmas[-1] > 0

    def without_guide(step: int, x0: Tensor, x: Tensor, steps: int) -> None:
        callback(step, x0[:, :, :-1], x[:, :, :-1], steps)

    told = without_guide if is_dropped and callback is not None else callback
    whole = executor(noise, latent_image, sampler, sigmas, denoise_mask, told, disable_pbar, seed, **kwargs)
    return whole[:, :, :-1] if is_dropped else whole


def _missing_guide(samples: Tensor, options: Mapping[str, Any]) -> Tensor | None:
    """[B, 16, 1, h, w] for samples that lack it, in the size of these; zeros behind an empty latent."""
    image = options.get("concat_latent_image")
    if not options.get(GUIDE) or image is None or samples.shape[2] + 1 != image.shape[2]:
        return None
    height, width = samples.shape[-2:]
    guide = comfy.utils.common_upscale(image[:, :, -1:], width, height, "bilinear", "center")
    guide = comfy.utils.repeat_to_batch_size(guide, samples.shape[0]).to(samples)
    return guide if samples.any() else torch.zeros_like(guide)  # the host shifts a latent that is not empty


def _with_ones(mask: Tensor) -> Tensor:
    return torch.cat([mask, torch.ones_like(mask[:, :, :1])], dim=2)


def _noise_like(guide: Tensor, noise: Tensor, seed: int | None) -> Tensor:
    """None where the run adds none; else of a seed of its own."""
    if not noise.any():
        return torch.zeros_like(guide).to(noise)
    generator = torch.Generator().manual_seed(((seed or 0) + 1) % 2**63)
    return torch.randn(guide.shape, generator=generator).to(noise)
