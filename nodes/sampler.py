"""The sampler: conditioning and an empty latent become a video latent."""

import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from .. import host
from ..wan.attention import Attention
from ..wan.config import WanConfig
from ..wan.execution import Execution
from ..wan.memory import MemoryPlan, StepSize, plans_from
from ..wan.option import Run
from ..wan.refusal import Refusal
from ..wan.retry import FiniteOrExact, NotFinite, WithinMemory
from ..wan.sample import Leg, SampleJob, Sampling
from ..wan.sigmas import BELOW_ONE
from ..wan.solvers import SOLVERS
from . import checks
from .kept_latent import SAMPLING_SECONDS, kept_until_done
from .load import CATEGORY
from .named import named
from .report import Part, memory_taken, sampling_report, time_taken
from .sampler_inputs import (
    Group,
    check_names,
    execution_of,
    option_inputs,
    options_of,
    settings,
    step_range_of,
)
from .sampler_start import check_start, given_sigmas, warnings_on_images, warnings_on_legs, warnings_on_start

NODE = "Wan21Sampler"
MAX_SEED = 0xFFFFFFFFFFFFFFFF
BOUNDARY_IMAGE, BOUNDARY_TEXT = 0.9, 0.875  # of the two experts, in shares of 1000 timesteps


class Wan21Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 Sampler",
            category=CATEGORY,
            description="Sample a video latent with the solvers of the Wan2.1 release.",
            search_aliases=["wan sampler", "ksampler", "unipc", "dpm++", "teacache", "nag", "riflex"],
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
            hidden=[io.Hidden.prompt, io.Hidden.unique_id],
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
        step_range: Group = None,
        execution: Group = None,
        model_low_noise: host.ModelPatcher | None = None,
        expert_boundary: float | None = 0.0,
        low_noise_guidance_scale: float | None = 0.0,
        sigmas: Tensor | None = None,
        **options: Any,
    ) -> io.NodeOutput:
        """`options` are the inputs of `options_of`."""
        if cls.hidden is not None and cls.hidden.prompt:
            node = cls.hidden.prompt.get(cls.hidden.unique_id)
            check_names({} if node is None else node["inputs"], cls.define_schema().inputs)
        checks.check_model(model)
        below_one = host.sigma_below_one(model) if sigmas is not None and solver in BELOW_ONE else 1.0
        job = SampleJob(
            steps,
            guidance_scale,
            flow_shift,
            solver,
            denoise,
            given_sigmas=None if sigmas is None else given_sigmas(sigmas, below_one),
            below_one=below_one,
            part=step_range_of(step_range),
        )
        models = [model]
        if model_low_noise is not None:
            checks.check_second_model(model, model_low_noise)
            models.append(model_low_noise)
            job = with_experts(job, host.config_of(model), expert_boundary, low_noise_guidance_scale)
        with nullcontext() if job.starts_from_noise else kept_until_done(latent, "refine or decode it"):
            latent, note = host.as_video_latent(model, latent)
            latent = host.with_guide(latent, positive)
            check_start(latent, job)
            prepared = [
                prepare(one, positive, negative, latent, job, leg, execution, options)
                for one, leg in zip(models, job.legs)
            ]
            notes = [note] if note else []
            notes += warnings_on_start(latent, job) + warnings_on_legs(job, len(models))
            return cls._sampled(prepared, latent, seed, notes)

    @classmethod
    def _sampled(
        cls, prepared: Sequence["Prepared"], latent: dict, seed: int, notes: list[str]
    ) -> io.NodeOutput:
        if seed == -1:
            seed = secrets.randbelow(2**32)
        walk = Walk(seed, [one for one in prepared if one.leg.steps])
        for sentence in (*notes, *walk.notes_before()):
            walk.note(sentence)
        samples = latent["samples"]
        parts = []
        for one in prepared:
            if one.leg.steps:
                with host.MemoryWatch(one.model) as memory:
                    samples, record = host.run_sampling(one.model, one, latent, seed, walk.run_of(one))
                parts.append(Part(one.job, one.run, record, f"{one.memory}; {memory.said}"))
        checks.check_finite(samples)
        if walk.progress is not None and prepared[0].job.sigmas[-1] == 0:
            walk.progress.finished(prepared[0].model.model.process_latent_in(samples))
        for sentence in (time_taken(parts), *memory_taken(parts)):
            host.tell(sentence)
        report = sampling_report(parts, seed, prepared[0].has_guide, walk.notes)
        job = prepared[0].job
        earlier = 0 if job.starts_from_noise else latent.get(SAMPLING_SECONDS, 0)  # what this one refined
        seconds = sum(sum(part.record.seconds) for part in parts)
        return io.NodeOutput(latent | {"samples": samples, SAMPLING_SECONDS: earlier + seconds}, report)


class Walk:
    """One run over the models that carry it out, and what is said of it.

    Args:
        seed: of the noise.
        prepared: what each model does, of those that have steps.
    """

    def __init__(self, seed: int, prepared: Sequence["Prepared"]):
        self.seed = seed
        self.prepared = prepared
        self.notes: list[str] = []
        self.sampling: Sampling | None = None
        self.progress: host.StepProgress | None = None

    def note(self, sentence: str) -> None:
        """Takes a sentence for the report, and says it at once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            host.tell(sentence)

    def notes_before(self) -> list[str]:
        """What is known before the first step; of two models, named where it holds for one of them."""
        told = [[*one.warnings, *one.job.idle_options(one.run)] for one in self.prepared]
        if len(told) == 1:
            return told[0]
        names = ("high-noise expert", "low-noise expert")
        return [
            sentence if all(sentence in other for other in told) else f"{name}: {sentence}"
            for name, sentences in zip(names, told)
            for sentence in sentences
        ]

    def run_of(self, prepared: "Prepared") -> Any:
        """The function that the host calls with the loaded model: it takes the steps of one leg."""

        def run(denoiser, noise, start, kept):
            job, model = prepared.job, prepared.model
            if self.sampling is None:
                self.progress = host.StepProgress(model, prepared.run.steps)
                levels = [job.first_sigma, *job.sigmas[1:]]
                fresh = host.fresh_noise(job.solver, noise, levels, self.seed)
                self.sampling = Sampling(job, noise, start, self.progress, fresh)
            within_memory = WithinMemory(denoiser, prepared.plans, denoiser.make_room, self.note)
            inner = FiniteOrExact(within_memory, prepared.exact_attention, self.note)
            try:
                record = self.sampling.advance(inner, prepared.leg, kept, job.options)
            except NotFinite as error:
                spoilt = host.spoilt_weight(model.model.diffusion_model)
                if spoilt is None and model.model.diffusion_model.sums_in_fp16:
                    raise host.OVERFLOWED from error
                if spoilt is None:
                    raise Refusal(error.problem, checks.BROKEN_LATENT) from error
                name = host.checkpoint_name(model)
                raise Refusal(
                    f"{error.problem}: {spoilt} in {name} holds NaN or infinite numbers",
                    "The file is damaged, or was converted wrongly: get it again",
                ) from error
            record.devices = {name: str(device) for name, device in denoiser.computed.items()}
            record.workers = host.workers_report(model)
            return self.sampling.latent, record

        return run


def with_experts(
    job: SampleJob, config: WanConfig, boundary: float | None, guidance_scale: float | None
) -> SampleJob:
    """The job with a second model; 0 and None are the release's boundary and the first one's guidance.

    Source: Wan2.2, wan/configs (`boundary`).
    """
    release = BOUNDARY_IMAGE if config.takes_image else BOUNDARY_TEXT
    return replace(job, boundary=boundary or release, low_noise_guidance_scale=guidance_scale or None)


@dataclass(frozen=True, kw_only=True)
class Prepared(host.Prepared):
    """What one model does of a job, past every check.

    Attributes:
        model: the MODEL, with the copies that have a part in it.
        job: what to sample, with the options of this model.
        leg: its steps and guidance.
        run: the job on this model and latent.
        plans: memory plans, the first to begin with.
        memory: one sentence on them.
        has_guide: whether the last latent frame is the end image, which is dropped when the run is done.
        exact_attention: as of `FiniteOrExact`.
        warnings: sentences on what was adjusted or left out.
    """

    model: host.ModelPatcher
    job: SampleJob
    leg: Leg
    run: Run
    plans: Sequence[MemoryPlan]
    memory: str
    has_guide: bool
    exact_attention: Attention | None
    warnings: list[str]


def prepare(
    model: host.ModelPatcher,
    positive: list,
    negative: list,
    latent: dict,
    job: SampleJob,
    leg: Leg,
    execution: Group,
    options: Mapping[str, Any],
) -> Prepared:
    """Checks the rest of the job for one model, before anything runs, and chooses how to carry it out.

    Args:
        model: a MODEL of ours.
        positive, negative: CONDITIONING.
        latent: LATENT.
        job: without options.
        leg: of the model.
        execution: the input of the node.
        options: inputs of `options_of`.
    """
    config, shape = host.config_of(model), tuple(latent["samples"].shape)
    job = replace(job, options=options_of(model, shape, **options))
    run = job.run_on(config, shape, leg)
    for option in job.options if leg.steps else ():
        option.check(run)
    model, split = host.spread(model, leg.pass_names)
    warnings = host.notes_on_file(model) + host.changed_in_host() + split
    warnings += [
        f"{name} set on the MODEL by another node is not used here" for name in host.ignored_patches(model)
    ]
    conds = {"positive": positive}
    if "uncond" in leg.pass_names or job.reads_negative:
        conds["negative"] = negative
    beside = 0
    for name, cond in conds.items():
        conds[name], note = host.trim_clip_vision(cond, config)
        about = host.describe_conditioning(name, conds[name])
        checks.check_finite_conditioning(name, conds[name])
        checks.check_conditioning(config, shape, about)
        warnings += checks.notes_on_conditioning(config, shape, about)
        warnings += [f"{name}: {note}"] if note else []
        beside = max(beside, about.frames_beside)
    warnings += warnings_on_images(config, positive, job.boundary > 0)
    joint, attention = execution_of(execution)
    devices = len(host.devices_of(model))
    if devices > 1 and joint and settings(execution, "execution"):
        warnings.append(
            "execution.joint_pass has no effect: MultiGPU CFG Split gives each pass to a device of its own"
        )
    walked = (*shape[:2], shape[2] + beside, *shape[3:])
    chosen = host.choose_attention_for(model, attention, StepSize(config, (1, *walked[1:])).tokens)
    if unused := host.unused_override(model, chosen):
        warnings.append(unused)
    to_get = host.attention_to_get(model, chosen) if attention == "auto" else ""
    execution_option = Execution(joint, chosen, host.kernels_of(model), to_get)
    job = replace(job, options=(*job.options, execution_option))
    passes = -(-len(leg.pass_names) // devices)
    plans = plans_from(joint, passes, devices > 1)
    plans, need, memory = host.plan_memory(model, walked, plans, passes, job.active(run))
    return Prepared(
        model=model,
        positive=conds["positive"],
        negative=conds.get("negative"),
        sigmas=job.sigmas,
        adds_noise=job.part.add_noise,
        need=need,
        job=job,
        leg=leg,
        run=run,
        plans=plans,
        memory=memory,
        has_guide=host.has_guide(positive) and job.sigmas[-1] == 0,
        exact_attention=host.retry_of(model, chosen),
        warnings=warnings,
    )
