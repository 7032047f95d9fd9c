"""The sampler: conditioning and an empty latent become a video latent."""

import secrets
import time

from comfy_api.latest import io

from ..wan import preflight
from ..wan.conditioning import END_LATENT_ALONE
from ..wan.config import CLIP_TOKENS
from ..wan.report import sampling_report
from ..wan.sample import SampleJob, sample
from ..wan.solvers import SOLVERS
from . import host
from .load import CATEGORY

NODE = "Wan21Sampler"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


class Wan21Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 Sampler",
            category=CATEGORY,
            description="Sample a video latent with the solvers of the Wan2.1 release.",
            search_aliases=["wan sampler", "ksampler", "unipc", "dpm++"],
            inputs=[
                io.Model.Input("model", tooltip="From Wan21ModelLoader."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative", tooltip="Not used when guidance_scale is 1."),
                io.Latent.Input("latent"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=-1,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="-1 draws a new seed each time the graph is queued; the report names it.",
                ),
                io.Int.Input("steps", default=30, min=1, max=1000),
                io.Float.Input(
                    "guidance_scale",
                    default=5.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="1 runs no negative pass and takes half the time.",
                ),
                io.Float.Input(
                    "flow_shift",
                    default=5.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    tooltip="The release: 3 for image-to-video at 480p, else 5; 16 for first-last-frame.",
                ),
                io.Combo.Input("solver", options=list(SOLVERS), default="unipc"),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 the given latent is the start: video to video.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, seed, **_):
        """A drawn seed is another job each time; a given one is the same job."""
        return time.time_ns() if seed == -1 else seed

    @classmethod
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        steps,
        guidance_scale,
        flow_shift,
        solver,
        denoise,
    ) -> io.NodeOutput:
        job = SampleJob(steps, guidance_scale, flow_shift, solver, denoise)
        positive, negative, warnings = prepare(model, positive, negative, latent, job)
        if seed == -1:
            seed = secrets.randbelow(2**32)
        on_step = host.StepProgress(model, steps)
        records = []

        def run(predict, noise, start):
            samples, record = sample(job, predict, noise, start, on_step)
            records.append(record)
            return samples

        with host.memory_watch(model.load_device) as memory:
            samples = host.run_sampling(
                model,
                positive,
                negative if "uncond" in job.pass_names else None,
                latent["samples"],
                latent.get("batch_index"),
                seed,
                job.sigmas,
                run,
            )
        preflight.check_finite(NODE, samples)
        report = sampling_report(
            host.config_of(model),
            job,
            records[0],
            samples.shape,
            seed,
            memory[0],
            END_LATENT_ALONE in latent,
            warnings,
        )
        return io.NodeOutput(latent | {"samples": samples}, report)


def prepare(model, positive, negative, latent, job):
    """Check the whole job before anything runs.

    Returns:
        (positive, negative, warnings), with CLIP features cut to what the model reads.
    """
    if not host.is_ours(model):
        preflight.fail(
            NODE,
            "the MODEL was not loaded by Wan21ModelLoader",
            "Load it with Wan21ModelLoader, or sample it with the host's KSampler",
        )
    config = host.config_of(model)
    samples = latent["samples"]
    preflight.check_latent(NODE, samples)
    if "noise_mask" in latent:
        preflight.fail(
            NODE,
            "the latent carries a noise mask, which this sampler does not apply",
            "Remove SetLatentNoiseMask, or sample with the host's KSampler",
        )
    if job.denoise < 1 and not samples.any():
        preflight.fail(
            NODE,
            f"denoise is {job.denoise:g} and the latent is empty; there is no video to start from",
            "Set denoise to 1, or connect an encoded video (VAEEncode)",
        )
    warnings = [
        f"{name} set on the MODEL by another node is not used here" for name in host.ignored_patches(model)
    ]
    checked = []
    for name, cond in (("positive", positive), ("negative", negative)):
        cond, note = host.trim_clip_vision(cond, config)
        preflight.check_conditioning(NODE, config, samples.shape, host.describe_conditioning(name, cond))
        checked.append(cond)
        warnings += [f"{name}: {note}"] if note else []
    if latent.get(END_LATENT_ALONE) and config.image_tokens:
        warnings.append(
            "add_frames_for_end_image is on and the model is first-last-frame, which was trained with it off"
        )
    if config.image_tokens and _clip_tokens(positive) == CLIP_TOKENS:
        warnings.append(
            "a first-last-frame model reads CLIP features of both images; clip_vision_end is missing"
        )
    return *checked, warnings


def _clip_tokens(conditioning):
    clip = host.describe_conditioning("", conditioning).clip
    return None if clip is None else clip[-2]
