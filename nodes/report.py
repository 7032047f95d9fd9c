"""The sampler's report: what was run, in sentences that fit a text preview.

TeaCache's plan is a line of marks: # computed, . reused, 0 no velocity (zero-init).
"""

from ..wan.conditioning import pixel_frames
from ..wan.config import VAE_STRIDE


def sampling_report(config, job, record, shape, seed, memory, end_alone=False, warnings=()):
    """Text of one finished run.

    Args:
        config: WanConfig of the model.
        job, record: SampleJob, SampleRecord.
        shape: of the latent, [B, 16, T, h, w].
        seed: that was used.
        memory: one sentence.
        end_alone: the last latent is the end image, which gives no frames.
        warnings: sentences on what was adjusted or left out.
    """
    batch, _, frames, height, width = shape
    seconds = record.seconds
    steady = seconds[1:] or seconds  # the first step also loads the model
    lines = [
        f"model: {config.kind}, {config.num_layers} blocks, width {config.dim}",
        f"size: {width * VAE_STRIDE[2]}x{height * VAE_STRIDE[1]}, {pixel_frames(frames - end_alone)} frames"
        + (f", batch {batch}" if batch > 1 else ""),
        f"latent: {frames} frames of {width}x{height}, {frames * height * width // 4} tokens",
        f"seed: {seed}",
        f"solver: {job.solver}, {len(seconds)} steps, guidance {job.guidance_scale:g}, "
        f"shift {job.flow_shift:g}, denoise {job.denoise:g}",
        f"sigmas: {_numbers(record.sigmas, '.4f')}",
        f"timesteps: {_numbers(record.timesteps, 'g')}",
        f"passes: {_passes(record.passes)}",
        *(["riflex: one temporal frequency lowered"] if record.riflex else []),
        *_options(job),
        *(_teacache(job, record) if record.plan else ()),
        f"time: {sum(seconds):.1f} s, {sum(steady) / len(steady):.2f} s per step",
        f"memory: {memory}",
    ]
    return "\n".join(lines + [f"note: {warning}" for warning in warnings])


def _options(job):
    """One line for each option that took part."""
    if job.attention is not None and job.attention.name != "sdpa":
        yield f"attention: {job.attention.name}"
    if job.zero_init_steps:
        yield f"zero-init: the first {job.zero_init_steps} steps have no velocity"
    if "uncond" not in job.pass_names:
        return
    if job.cfg_star:
        yield f"guidance: CFG-Zero* from step {job.cfg_star_start_step}"
    if job.skip_layers:
        start, end = job.skip_layer_start_percent, job.skip_layer_end_percent
        blocks = " ".join(map(str, job.skip_layers))
        yield f"skip layers: {blocks} of the unconditional pass, from {start} % to {end} % of the steps"
    if not job.joint_pass:
        yield "joint pass: off"


def _teacache(job, record):
    """The plan as marks, what it promised and what it gave."""
    plan, zeros = record.plan, job.zero_init_steps
    total = len(plan.compute)
    speed_up = total / plan.computed
    yield (
        f"teacache: {plan.computed} of {total} steps computed, profile {job.teacache_profile.name}, "
        f"threshold {plan.threshold:.3g}"
    )
    yield "plan: " + "0" * zeros + "".join("#" if compute else "." for compute in plan.compute)
    if plan.computed != plan.wanted:
        yield (
            f"teacache_multiplier {job.teacache_multiplier:g} asks for {plan.wanted} computed steps; the "
            f"nearest that can be is {plan.computed}, {speed_up:.2f}x"
        )
    timed = list(zip(plan.compute, record.seconds[zeros:]))[1:]  # the first step also loads the model
    computed, reused = ([s for c, s in timed if c is kind] for kind in (True, False))
    if computed and reused:
        each = sum(computed) / len(computed)
        measured = total * each / (plan.computed * each + sum(reused))
        yield (
            f"speed-up: {speed_up:.2f}x expected, {measured:.2f}x measured "
            f"({each:.3g} s a computed step, {sum(reused) / len(reused):.3g} s a reused one)"
        )


def _numbers(values, spec):
    return " ".join(format(value, spec) for value in values)


def _passes(passes):
    names = sorted({name for step in passes for name in step})
    counts = [f"{sum(name in step for step in passes)} {name}" for name in names]
    return ", ".join(counts)
