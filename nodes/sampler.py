"""The sampler: conditioning and an empty latent become a video latent."""

import secrets
import time
from contextlib import nullcontext
from dataclasses import replace

from comfy_api.latest import io

from .. import host
from ..wan import attention, teacache
from ..wan.config import CLIP_TOKENS, VAE_STRIDE
from ..wan.memory import plans_from
from ..wan.refusal import Refusal
from ..wan.sample import RIFLEX, NotFinite, SampleJob, sample
from ..wan.skip_layer import parse_layers
from ..wan.solvers import SOLVERS
from . import checks
from .kept_latent import END_LATENT_ALONE, SAMPLING_SECONDS, kept_until_done
from .load import CATEGORY
from .named import named
from .report import sampling_report

NODE = "Wan21Sampler"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def option_inputs():
    """The inputs added after the first ones: each is optional, and its default leaves the numbers alone."""
    percent = dict(min=0, max=100, optional=True)
    return [
        io.Float.Input(
            "teacache_multiplier",
            default=0.0,
            min=0.0,
            max=10.0,
            step=0.05,
            optional=True,
            tooltip="Target speed-up: steps that change little reuse what an earlier one made. 0 is off; "
            "1.5 to 2.5 is usual. The report shows which steps were computed.",
        ),
        io.Int.Input(
            "teacache_start_percent",
            default=0,
            **percent,
            tooltip="This share of the steps is always computed; higher keeps more of the motion.",
        ),
        io.Boolean.Input(
            "cfg_star",
            default=False,
            optional=True,
            tooltip="CFG-Zero*: scales the negative pass to fit the positive one before they are combined.",
        ),
        io.Int.Input(
            "cfg_star_start_step",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="Plain guidance before this step, counted from 0.",
            advanced=True,
        ),
        io.Int.Input(
            "zero_init_steps",
            default=0,
            min=0,
            max=1000,
            optional=True,
            tooltip="In the first steps of this number the latent is left as it is. 0 is off; the authors of "
            "CFG-Zero* use 1 for image-to-video.",
            advanced=True,
        ),
        io.Combo.Input(
            "riflex",
            options=list(RIFLEX),
            default="off",
            optional=True,
            tooltip="RIFLEx, against repetition in long clips. It changes nothing below 181 frames. auto "
            "acts past the trained length only.",
        ),
        io.Boolean.Input(
            "joint_pass",
            default=True,
            optional=True,
            tooltip="Both passes go through each block before the next one. Off takes less memory; "
            "the numbers are the same.",
        ),
        io.Combo.Input(
            "attention",
            options=list(attention.CHOICES),
            default="auto",
            optional=True,
            tooltip="auto takes the fastest installed one that agrees with sdpa on this device.",
            advanced=True,
        ),
        io.String.Input(
            "skip_layers",
            default="",
            optional=True,
            tooltip="Skip-layer guidance: blocks that the negative pass leaves out, such as 9 or 9,10. Empty "
            "is off.",
        ),
        io.Int.Input(
            "skip_layer_start_percent",
            default=10,
            **percent,
            tooltip="The blocks are left out from here on.",
            advanced=True,
        ),
        io.Int.Input(
            "skip_layer_end_percent",
            default=90,
            **percent,
            tooltip="The blocks are left out up to here.",
            advanced=True,
        ),
        io.Combo.Input(
            "teacache_profile",
            options=list(teacache.PROFILES),
            default="auto",
            optional=True,
            tooltip="Coefficients of TeaCache. auto takes those of the checkpoint itself, or chooses by "
            "model, file name and size; measured are those of scripts/calibrate_teacache.py.",
            advanced=True,
        ),
    ]


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
                    tooltip="-1, set here, draws a new seed each time the graph is queued; the report "
                    "names it.",
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
                *option_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent"), io.String.Output(display_name="report")],
        )

    @classmethod
    def fingerprint_inputs(cls, seed, **_):
        """A drawn seed is another job each time; a given one is the same job."""
        return time.time_ns() if seed == -1 else seed

    @classmethod
    @named(NODE)
    def execute(
        cls,
        model,
        positive,
        negative,
        latent,
        seed,
        attention="auto",
        skip_layers="",
        teacache_profile="auto",
        **settings,
    ) -> io.NodeOutput:
        """`settings` are the fields of `SampleJob`; the three before them are resolved here."""
        job = SampleJob(**settings)
        options = (attention, skip_layers, teacache_profile)
        refines = job.denoise < 1
        with kept_until_done(latent, "refine or decode it") if refines else nullcontext():
            return cls._sampled(model, positive, negative, latent, seed, job, options)

    @classmethod
    def _sampled(cls, model, positive, negative, latent, seed, job, options):
        positive, negative, warnings = prepare(model, positive, negative, latent, job)
        job = resolve_options(model, latent["samples"], job, *options)
        job, need, plan = plan_memory(model, latent["samples"], job)
        if seed == -1:
            seed = secrets.randbelow(2**32)
        on_step = host.StepProgress(model, job.steps)
        records = []

        def run(denoiser, noise, start):
            try:
                samples, record = sample(job, denoiser, noise, start, on_step)
            except NotFinite as error:
                raise Refusal(str(error), checks.BROKEN_LATENT) from error
            records.append(record)
            return samples

        with host.memory_watch(model.load_device) as memory:
            samples = host.run_sampling(
                model,
                positive,
                negative,
                latent["samples"],
                latent.get("batch_index"),
                seed,
                job.sigmas,
                run,
                need,
            )
        checks.check_finite(samples)
        report = sampling_report(
            host.config_of(model),
            job,
            records[0],
            samples.shape,
            seed,
            f"{plan}; {memory[0]}",
            END_LATENT_ALONE in latent,
            warnings + records[0].notes,
        )
        earlier = latent.get(SAMPLING_SECONDS, 0) if job.denoise < 1 else 0  # what this one refined
        seconds = {SAMPLING_SECONDS: earlier + sum(records[0].seconds)}
        return io.NodeOutput(latent | {"samples": samples} | seconds, report)


def resolve_options(model, samples, job, attention_name, skip_layers, profile_name):
    """What the options' names mean for this model; errors before anything runs.

    Returns:
        The job with its attention, skipped blocks and TeaCache coefficients.
    """
    config = host.config_of(model)
    job = replace(job, skip_layers=parse_layers(skip_layers))
    checks.check_options(config, job)
    if job.teacache_multiplier > 1:
        pixels = samples.shape[-2] * samples.shape[-1] * VAE_STRIDE[1] * VAE_STRIDE[2]
        measured, name = host.measured_coefficients(model), host.checkpoint_name(model)
        profile = teacache.choose_profile(profile_name, config, name, pixels, measured)
        job = replace(job, teacache_profile=profile)
    return replace(job, attention=host.choose_attention_for(model, attention_name))


def plan_memory(model, samples, job):
    """-> (the job with its memory plans, bytes of a step, one sentence on the plan)"""
    passes = len(job.pass_names)
    name = job.attention and job.attention.name
    plans = plans_from(job.joint_pass, passes)
    cached = job.teacache_multiplier > 1
    plans, need, said = host.plan_memory(model, samples.shape, plans, passes, name, cached)
    return replace(job, plans=plans), need, said


def prepare(model, positive, negative, latent, job):
    """Check the whole job before anything runs.

    Returns:
        (positive, negative, warnings), with CLIP features cut to what the model reads; negative is None
        when no pass uses it.
    """
    if not host.is_ours(model):
        raise Refusal(
            "the MODEL was not loaded by Wan21ModelLoader",
            "Load it with Wan21ModelLoader, or sample it with the host's KSampler",
        )
    if refusal := host.refused_patch(model):
        raise refusal
    config = host.config_of(model)
    samples = latent["samples"]
    checks.check_latent(samples)
    if "noise_mask" in latent:
        raise Refusal(
            "the latent carries a noise mask, which this sampler does not apply",
            "Remove SetLatentNoiseMask, or sample with the host's KSampler",
        )
    if job.denoise < 1 and not samples.any():
        raise Refusal(
            f"denoise is {job.denoise:g} and the latent is empty; there is no video to start from",
            "Set denoise to 1, or connect an encoded video (VAEEncode)",
        )
    warnings = [
        f"{name} set on the MODEL by another node is not used here" for name in host.ignored_patches(model)
    ]
    checked = []
    used = {"positive": positive, "negative": negative if "uncond" in job.pass_names else None}
    for name, cond in used.items():
        if cond is None:
            checked.append(None)
            continue
        cond, note = host.trim_clip_vision(cond, config)
        checks.check_conditioning(config, samples.shape, host.describe_conditioning(name, cond))
        checked.append(cond)
        warnings += [f"{name}: {note}"] if note else []
    if latent.get(END_LATENT_ALONE) and config.image_tokens:
        warnings.append(
            "add_frames_for_end_image is on and the model is first-last-frame, which was trained with it off"
        )
    if config.takes_image and config.image_dim is None:
        warnings.append(
            "the model has no image branch, as Wan2.2-A14B: CLIP vision is not used. If it is one of the two "
            "experts (high noise, low noise), it is made for its part of the steps; the host's "
            "KSamplerAdvanced runs both"
        )
    if config.image_tokens and _clip_tokens(positive) == CLIP_TOKENS:
        warnings.append(
            "a first-last-frame model reads CLIP features of both images; clip_vision_end is missing"
        )
    return *checked, warnings


def _clip_tokens(conditioning):
    clip = host.describe_conditioning("", conditioning).clip
    return None if clip is None else clip[-2]
