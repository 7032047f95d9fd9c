"""The sampler: conditioning and an empty latent become a video latent."""

import secrets
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from comfy_api.latest import io

from .. import host
from ..wan.attention import CHOICES
from ..wan.config import CLIP_TOKENS, VAE_STRIDE, WanConfig
from ..wan.execution import Execution
from ..wan.guidance import CfgZeroStar, ZeroInit
from ..wan.memory import MemoryPlan, plans_from
from ..wan.option import Option, Run
from ..wan.refusal import Refusal
from ..wan.retry import FiniteOrSdpa, NotFinite, WithinMemory
from ..wan.riflex import MODES, Riflex
from ..wan.sample import SampleJob, sample
from ..wan.sigmas import is_full_run
from ..wan.skip_layer import SkipLayers, parse_layers
from ..wan.solvers import SOLVERS
from ..wan.teacache import PROFILES, Profile, TeaCache, choose_profile
from . import checks
from .kept_latent import SAMPLING_SECONDS, kept_until_done
from .load import CATEGORY
from .named import named
from .report import sampling_report

NODE = "Wan21Sampler"
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def option_inputs() -> list[Any]:
    """The inputs added after the first ones: each is optional, and its default leaves the numbers alone."""
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
            min=0,
            max=100,
            optional=True,
            tooltip="The first steps, of this share, are all computed; higher keeps more of the motion.",
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
            options=list(MODES),
            default="off",
            optional=True,
            tooltip="RIFLEx, against repetition in long clips. It changes nothing below 181 frames; from "
            "there on auto and on are the same.",
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
            options=list(CHOICES),
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
            min=0,
            max=100,
            optional=True,
            tooltip="The blocks are left out from here on.",
            advanced=True,
        ),
        io.Int.Input(
            "skip_layer_end_percent",
            default=90,
            min=0,
            max=100,
            optional=True,
            tooltip="The blocks are left out up to here.",
            advanced=True,
        ),
        io.Combo.Input(
            "teacache_profile",
            options=list(PROFILES),
            default="auto",
            optional=True,
            tooltip="Coefficients of TeaCache. auto takes those of the checkpoint itself, or chooses by "
            "model, file name and size; measured are those of scripts/calibrate_teacache.py.",
            advanced=True,
        ),
    ]


class Wan21Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
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
    def fingerprint_inputs(cls, seed: int, **_: Any) -> int:
        """A drawn seed is another job each time; a given one is the same job."""
        return time.time_ns() if seed == -1 else seed

    @classmethod
    @named(NODE)
    def execute(
        cls,
        model: host.ModelPatcher,
        positive: list,
        negative: list,
        latent: dict,
        seed: int,
        steps: int,
        guidance_scale: float,
        flow_shift: float,
        solver: str,
        denoise: float,
        joint_pass: bool = True,
        attention: str = "auto",
        **options: Any,
    ) -> io.NodeOutput:
        """`options` are the inputs of `options_of`."""
        job = SampleJob(steps, guidance_scale, flow_shift, solver, denoise)
        with nullcontext() if is_full_run(denoise) else kept_until_done(latent, "refine or decode it"):
            checks.check_model(model)
            latent, note = host.as_video_latent(model, latent)
            latent = host.with_guide(latent, positive)
            check_start(latent, denoise)
            job = replace(job, options=options_of(model, latent["samples"].shape, **options))
            prepared = prepare(model, positive, negative, latent, job, joint_pass, attention)
            prepared.warnings[:0] = [note] if note else []
            return cls._sampled(model, prepared, latent, seed)

    @classmethod
    def _sampled(
        cls, model: host.ModelPatcher, prepared: "Prepared", latent: dict, seed: int
    ) -> io.NodeOutput:
        job = prepared.job
        if seed == -1:
            seed = secrets.randbelow(2**32)
        on_step = host.StepProgress(model, job.steps)
        notes: list[str] = []

        def note(sentence: str) -> None:
            notes.append(sentence)
            host.tell(sentence)

        for sentence in (*prepared.warnings, *job.idle_options(prepared.run)):
            note(sentence)

        def run(denoiser, noise, start, kept):
            inner = WithinMemory(denoiser, prepared.plans, denoiser.make_room, note)
            try:
                return sample(job, FiniteOrSdpa(inner, note), noise, start, on_step, kept)
            except NotFinite as error:
                raise Refusal(error.problem, checks.BROKEN_LATENT) from error

        with host.MemoryWatch(model.load_device) as memory:
            samples, record = host.run_sampling(model, prepared, latent, seed, run)
        checks.check_finite(samples)
        report = sampling_report(
            job,
            prepared.run,
            record,
            seed,
            f"{prepared.memory}; {memory.said}",
            prepared.has_guide,
            notes,
        )
        earlier = 0 if is_full_run(job.denoise) else latent.get(SAMPLING_SECONDS, 0)  # what this one refined
        seconds = {SAMPLING_SECONDS: earlier + sum(record.seconds)}
        return io.NodeOutput(latent | {"samples": samples} | seconds, report)


def options_of(
    model: host.ModelPatcher,
    shape: tuple[int, ...],
    *,
    teacache_multiplier: float = 0.0,
    teacache_start_percent: int = 0,
    teacache_profile: str = "auto",
    cfg_star: bool = False,
    cfg_star_start_step: int = 0,
    zero_init_steps: int = 0,
    riflex: str = "off",
    skip_layers: str = "",
    skip_layer_start_percent: int = 10,
    skip_layer_end_percent: int = 90,
) -> tuple[Option, ...]:
    """The options that the node's inputs turn on, in the order in which they act.

    Args:
        model: a MODEL of ours.
        shape: of the latent, [B, 16, T, h, w].

    Raises:
        Refusal: an input cannot be read, or there are no TeaCache coefficients for the model.
    """
    options: list[Option] = []
    if riflex != "off":
        options.append(Riflex(riflex))
    if zero_init_steps:
        options.append(ZeroInit(zero_init_steps))
    if cfg_star:
        options.append(CfgZeroStar(cfg_star_start_step))
    if layers := parse_layers(skip_layers):
        options.append(SkipLayers(layers, skip_layer_start_percent, skip_layer_end_percent))
    if teacache_multiplier not in (0, 1):
        profile = profile_of(model, shape, teacache_profile) if teacache_multiplier > 1 else None
        options.append(TeaCache(teacache_multiplier, teacache_start_percent, profile))
    return tuple(options)


def profile_of(model: host.ModelPatcher, shape: tuple[int, ...], name: str) -> Profile:
    """The TeaCache coefficients of a MODEL for a latent of this shape."""
    pixels = shape[-2] * shape[-1] * VAE_STRIDE[1] * VAE_STRIDE[2]
    measured = host.measured_coefficients(model)
    return choose_profile(name, host.config_of(model), host.checkpoint_name(model), pixels, measured)


@dataclass(frozen=True, kw_only=True)
class Prepared(host.Prepared):
    """A job that has passed every check.

    Attributes:
        job: what to sample.
        run: the same on this model and latent.
        plans: memory plans, the first to begin with.
        memory: one sentence on them.
        has_guide: whether the last latent frame is the end image, which is dropped when the run is done.
        warnings: sentences on what was adjusted or left out.
    """

    job: SampleJob
    run: Run
    plans: Sequence[MemoryPlan]
    memory: str
    has_guide: bool
    warnings: list[str]


def prepare(
    model: host.ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    job: SampleJob,
    joint: bool,
    attention: str,
) -> Prepared:
    """Checks the rest of the job, before anything runs, and chooses how to carry it out.

    Args:
        model: a MODEL of ours.
        positive, negative: CONDITIONING.
        latent: LATENT.
        job: with its options.
        joint: whether the passes walk the blocks together.
        attention: one of `wan.attention.CHOICES`.
    """
    config, shape = host.config_of(model), tuple(latent["samples"].shape)
    run = job.run_on(config, shape)
    for option in job.options:
        option.check(run)
    warnings = [
        f"{name} set on the MODEL by another node is not used here" for name in host.ignored_patches(model)
    ]
    conds = {"positive": positive}
    if "uncond" in (*job.pass_names, *job.contexts):
        conds["negative"] = negative
    beside = 0
    for name, cond in conds.items():
        conds[name], note = host.trim_clip_vision(cond, config)
        about = host.describe_conditioning(name, conds[name])
        checks.check_conditioning(config, shape, about)
        warnings += checks.notes_on_conditioning(config, shape, about)
        warnings += [f"{name}: {note}"] if note else []
        beside = max(beside, about.frames_beside)
    warnings += warnings_on_images(config, positive) + warnings_on_start(latent, job.denoise)
    execution = Execution(joint, host.choose_attention_for(model, attention))
    job = replace(job, options=(*job.options, execution))
    passes = len(job.pass_names)
    plans = plans_from(joint, passes)
    walked = (*shape[:2], shape[2] + beside, *shape[3:])
    plans, need, memory = host.plan_memory(model, walked, plans, passes, job.active(run))
    return Prepared(
        positive=conds["positive"],
        negative=conds.get("negative"),
        sigmas=job.sigmas,
        need=need,
        job=job,
        run=run,
        plans=plans,
        memory=memory,
        has_guide=host.has_guide(positive),
        warnings=warnings,
    )


def check_start(latent: dict, denoise: float) -> None:
    """Whether the LATENT is one of Wan2.1 that this sampler can start from."""
    checks.check_latent(latent["samples"])
    if not is_full_run(denoise) and not latent["samples"].any():
        raise Refusal(
            f"denoise is {denoise:g} and the latent is empty; there is no video to start from",
            "Set denoise to 1, or connect an encoded video (VAEEncode)",
        )


def warnings_on_start(latent: dict, denoise: float) -> list[str]:
    """What a full run does not take from a latent."""
    if not is_full_run(denoise) or "noise_mask" in latent or not latent["samples"].any():
        return []
    return ["the latent holds a video, and at denoise 1 nothing of it is used; below 1 it is the start"]


def warnings_on_images(config: WanConfig, positive: list) -> list[str]:
    """What is unusual about images and this model, and can be run all the same."""
    warnings = []
    if host.has_guide(positive) and config.image_tokens:
        warnings.append(
            "add_frames_for_end_image is on and the model is first-last-frame, which was trained with it off"
        )
    if config.takes_image and config.image_dim is None:
        warnings.append(
            "the model has no image branch, as Wan2.2-A14B: CLIP vision is not used. If it is one of the two "
            "experts (high noise, low noise), it is made for its part of the steps; the host's "
            "KSamplerAdvanced runs both"
        )
    clip = host.describe_conditioning("", positive).clip
    if config.image_tokens and clip is not None and clip[-2] == CLIP_TOKENS:
        warnings.append(
            "a first-last-frame model reads CLIP features of both images; clip_vision_end is missing"
        )
    return warnings
