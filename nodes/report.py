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
    """Text of one finished run: what was adjusted first, long rows of numbers last.

    Args:
        parts: of the models that took steps, one or two.
        seed: that was used.
        end_alone: the last latent is the end image, which gives no frames.
        warnings: sentences on what was adjusted or left out.
    """
    first = parts[0]
    job, record = first.job, first.record
    batch, _, frames, height, width = first.run.shape
    steps = sum(len(part.record.seconds) for part in parts)
    tokens = frames * -(-height // 2) * -(-width // 2)
    schedule = f"shift {job.flow_shift:g}, denoise {job.denoise:g}"
    if job.given_sigmas is not None:
        schedule = "sigmas as given"
    experts = [_expert(part, len(parts) > 1 or job.boundary > 0) for part in parts]
    lines = [
        *(f"note: {warning}" for warning in warnings),
        f"time: {time_taken(parts)}",
        *(f"memory: {sentence}" for sentence in memory_taken(parts)),
        f"size: {width * VAE_STRIDE[2]}x{height * VAE_STRIDE[1]}, {pixel_frames(frames - end_alone)} frames"
        + (f", batch {batch}" if batch > 1 else ""),
        f"seed: {seed}",
        f"solver: {job.solver}, {steps} steps, guidance {job.guidance_scale:g}, {schedule}",
        *(line for part, expert in zip(parts, experts) for line in _of_part(part, expert)),
        f"model: {_model(first)}",
        f"latent: {frames} frames of {width}x{height}, {tokens} tokens",
        f"sigmas: {_numbers(record.sigmas, '.4f')}",
        f"timesteps: {_numbers(record.timesteps, 'g')}",
    ]
    return "\n".join(lines)


def time_taken(parts: Sequence[Part]) -> str:
    """Seconds of a run and of its step, for people."""
    seconds = [second for part in parts for second in part.record.seconds]
    steady = seconds[1:] or seconds  # the first step also loads the model
    return f"{sum(seconds):.1f} s, {sum(steady) / len(steady):.2f} s per step"


def memory_taken(parts: Sequence[Part]) -> list[str]:
    """What each model took, for people."""
    if len(parts) == 1:
        return [parts[0].memory]
    return [f"{_expert(part, True)}: {part.memory}" for part in parts]


def _model(part: Part) -> str:
    config = part.run.config
    return f"{config.kind}, {config.num_layers} blocks, width {config.dim}"


def _expert(part: Part, experts: bool) -> str:
    """Which of two experts a part is; empty where there is one model."""
    if not experts:
        return ""
    run = part.run
    is_second = run.own_steps.start or run.timesteps[0] < 1000 * part.job.boundary
    return "low-noise expert" if is_second else "high-noise expert"


def _of_part(part: Part, expert: str) -> Iterable[str]:
    job, run, own = part.job, part.run, part.run.own_steps
    if expert:
        second = job.low_noise_guidance_scale if expert.startswith("low") else None
        scale = job.guidance_scale if second is None else second
        yield f"{expert}: {_model(part)}, steps {own.start + 1} to {own.stop}, guidance {scale:g}"
    yield f"passes: {_passes(part.record.passes)}"
    if devices := part.record.devices:
        yield "devices: " + ", ".join(f"{name} on {device}" for name, device in sorted(devices.items()))
    yield from part.record.workers
    for option in job.active(run):
        yield from option.report(run, part.record)


def _numbers(values: Iterable[float], spec: str) -> str:
    return " ".join(format(value, spec) for value in values)


def _passes(passes: Sequence[tuple[str, ...]]) -> str:
    names = sorted({name for step in passes for name in step})
    counts = [f"{sum(name in step for step in passes)} {name}" for name in names]
    return ", ".join(counts)
