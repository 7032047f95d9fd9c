"""What a run of the sampler starts from: given noise levels, the latent, the images. Refused, or told."""

from torch import Tensor

from .. import host
from ..wan.config import CLIP_TOKENS, WanConfig
from ..wan.refusal import Refusal
from ..wan.sample import SampleJob
from ..wan.sigmas import check_sigmas
from . import checks

NEARLY_NOISE = 0.5  # ddim_uniform, which begins below 1, is above it from 2 steps on


def given_sigmas(sigmas: Tensor, below_one: float) -> tuple[float, ...]:
    """The numbers of a SIGMAS.

    Args:
        below_one: what the solver takes a first 1 for.

    Raises:
        Refusal: they are no schedule of a flow model.
    """
    told = [float(sigma) for sigma in sigmas.flatten()]
    check_sigmas(told)
    if told[0] >= 1 and told[1] >= below_one:
        raise Refusal(
            f"sigmas go from 1 to {told[1]:.7g}, and this solver begins at {below_one:.7g} in place of 1: no "
            "step lies between",
            "Leave the second number out, or choose another solver",
        )
    return tuple(told)


def check_start(latent: dict, job: SampleJob) -> None:
    """Whether the LATENT is one of Wan2.1 that this sampler can start from."""
    checks.check_latent(latent["samples"])
    if job.starts_from_noise or latent["samples"].any() or job.sigmas[0] > 0.9999:
        return
    what, noise = f"denoise is {job.denoise:g}", "denoise 1, step 0"
    if job.given_sigmas is not None or job.part.start_at_step:
        what = f"the first noise level is {job.sigmas[0]:.4g}"
    if job.given_sigmas is not None:
        if job.part.start_at_step == 0 and job.sigmas[0] >= NEARLY_NOISE:
            return  # said by `warnings_on_start`
        noise = "sigmas from 1, step 0"
    raise Refusal(
        f"{what} and the latent is empty; there is no video to start from",
        f"Start from pure noise ({noise}), or connect an encoded video (VAEEncode)",
    )


def warnings_on_start(latent: dict, job: SampleJob) -> list[str]:
    """What of the inputs is not used."""
    warnings = []
    if job.starts_from_noise and "noise_mask" not in latent and latent["samples"].any():
        warnings.append(
            "the latent holds a video, and at denoise 1 nothing of it is used; below 1 it is the start"
        )
    if job.given_sigmas is not None:
        warnings.append("sigmas are connected: steps, flow_shift and denoise are not used")
        if job.part.start_at_step == 0 and job.sigmas[0] <= 0.9999 and not latent["samples"].any():
            warnings.append(
                f"the sigmas begin at {job.sigmas[0]:.4g} and the latent is empty: the rest of the start is "
                "grey, as in the host's samplers"
            )
        if job.sigmas[-1] and not job.part.return_with_leftover_noise:
            warnings.append(
                f"the sigmas end at {job.sigmas[-1]:.4g}: the latent keeps its noise, for a sampler that "
                "goes on from there"
            )
    if job.part.start_at_step and job.solver in ("unipc", "dpm++"):
        warnings.append(
            f"{job.solver} looks back at earlier steps, and a later part of a run begins without them: two "
            "parts differ a little from the whole"
        )
    return warnings


def warnings_on_legs(job: SampleJob, models: int) -> list[str]:
    """Which of two experts has nothing to do."""
    if models < 2:
        return []
    first, second = job.legs
    told = f"boundary {job.boundary:g}, timesteps {job.told[0]:g} to {job.told[-1]:g}"
    if not first.steps:
        return [f"model (the high-noise expert) has no step here and is not loaded: {told}"]
    if not second.steps:
        return [f"model_low_noise has no step here and is not loaded: {told}"]
    return []


def warnings_on_images(config: WanConfig, positive: list, two_experts: bool) -> list[str]:
    """What is unusual about images and this model, and can be run all the same."""
    warnings = []
    if host.has_guide(positive) and config.image_tokens:
        warnings.append(
            "add_frames_for_end_image is on and the model is first-last-frame, which was trained with it off"
        )
    clip = host.describe_conditioning("", positive).clip
    if config.takes_image and config.image_dim is None and not two_experts:
        warnings.append(
            "the model has no image branch, as Wan2.2-A14B. If it is one of the two experts (high noise, "
            "low noise), it is made for its part of the steps: connect the other as model_low_noise"
        )
    if clip is not None and config.image_dim is None:
        warnings.append("the model has no image branch: CLIP vision is not used")
    if config.image_tokens and clip is not None and clip[-2] == CLIP_TOKENS:
        warnings.append(
            "a first-last-frame model reads CLIP features of both images; clip_vision_end is missing"
        )
    return warnings
