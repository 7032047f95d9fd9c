"""The sampler's report: what was run, in sentences that fit a text preview."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..wan.conditioning import pixel_frames
from ..wan.config import VAE_STRIDE
from ..wan.option import Run, SampleRecord
from ..wan.sample import SampleJob


@dataclass(frozen=True)
class Part:
    """What one model did of a run.

    Attributes:
        job: what was asked for, with the options of this model.
        run: the same on this model and latent.
        record: what was done.
        memory: one sentence.
    """

    job: SampleJob
    run: Run
    record: SampleRecord
    memory: str


def sampling_report(
    parts: Sequence[Part], seed: int, end_alone: bool = False, warnings: Sequence[str] = ()
) -> str:
    """Text of one finished run.

    Args:
        parts: of the models that took steps, one or two.
        seed: that was used.
        end_alone: the last latent is the end image, which gives no frames.
        warnings: sentences on what was adjusted or left out.
    """
    first = parts[0]
    job, record = first.job, first.record
    batch, _, frames, height, width = first.run.shape
    seconds = [second for part in parts for second in part.record.seconds]
    steady = seconds[1:] or seconds  # the first step also loads the model
    tokens = frames * -(-height // 2) * -(-width // 2)
    schedule = f"shift {job.flow_shift:g}, denoise {job.denoise:g}"
    if job.given_sigmas is not None:
        schedule = "sigmas as given"
    lines = [
        f"model: {_model(first)}",
        f"size: {width * VAE_STRIDE[2]}x{height * VAE_STRIDE[1]}, {pixel_frames(frames - end_alone)} frames"
        + (f", batch {batch}" if batch > 1 else ""),
        f"latent: {frames} frames of {width}x{height}, {tokens} tokens",
        f"seed: {seed}",
        f"solver: {job.solver}, {len(seconds)} steps, guidance {job.guidance_scale:g}, {schedule}",
        f"sigmas: {_numbers(record.sigmas, '.4f')}",
        f"timesteps: {_numbers(record.timesteps, 'g')}",
        *(line for part in parts for line in _of_part(part, len(parts) > 1 or job.boundary > 0)),
        f"time: {sum(seconds):.1f} s, {sum(steady) / len(steady):.2f} s per step",
    ]
    return "\n".join(lines + [f"note: {warning}" for warning in warnings])


def _model(part: Part) -> str:
    config = part.run.config
    return f"{config.kind}, {config.num_layers} blocks, width {config.dim}"


def _of_part(part: Part, is_expert: bool) -> Iterable[str]:
    job, run, own = part.job, part.run, part.run.own_steps
    if is_expert:
        name = "low-noise" if own.start or run.timesteps[0] < 1000 * job.boundary else "high-noise"
        second = job.low_noise_guidance_scale if name == "low-noise" else None
        scale = job.guidance_scale if second is None else second
        yield f"{name} expert: {_model(part)}, steps {own.start + 1} to {own.stop}, guidance {scale:g}"
    yield f"passes: {_passes(part.record.passes)}"
    if devices := part.record.devices:
        yield "devices: " + ", ".join(f"{name} on {device}" for name, device in sorted(devices.items()))
    for option in job.active(run):
        yield from option.report(run, part.record)
    yield f"memory: {part.memory}"


def _numbers(values: Iterable[float], spec: str) -> str:
    return " ".join(format(value, spec) for value in values)


def _passes(passes: Sequence[tuple[str, ...]]) -> str:
    names = sorted({name for step in passes for name in step})
    counts = [f"{sum(name in step for step in passes)} {name}" for name in names]
    return ", ".join(counts)
