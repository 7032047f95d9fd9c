"""The sampler's report: what was run, in sentences that fit a text preview."""

from collections.abc import Iterable, Sequence

from ..wan.conditioning import pixel_frames
from ..wan.config import VAE_STRIDE
from ..wan.option import Run, SampleRecord
from ..wan.sample import SampleJob


def sampling_report(
    job: SampleJob,
    run: Run,
    record: SampleRecord,
    seed: int,
    memory: str,
    end_alone: bool = False,
    warnings: Sequence[str] = (),
) -> str:
    """Text of one finished run.

    Args:
        job: what was asked for.
        run: the same on this model and latent.
        record: what was done.
        seed: that was used.
        memory: one sentence.
        end_alone: the last latent is the end image, which gives no frames.
        warnings: sentences on what was adjusted or left out.
    """
    batch, _, frames, height, width = run.shape
    config, seconds = run.config, record.seconds
    steady = seconds[1:] or seconds  # the first step also loads the model
    lines = [
        f"model: {config.kind}, {config.num_layers} blocks, width {config.dim}",
        f"size: {width * VAE_STRIDE[2]}x{height * VAE_STRIDE[1]}, {pixel_frames(frames - end_alone)} frames"
        + (f", batch {batch}" if batch > 1 else ""),
        f"latent: {frames} frames of {width}x{height}, {frames * -(-height // 2) * -(-width // 2)} tokens",
        f"seed: {seed}",
        f"solver: {job.solver}, {len(seconds)} steps, guidance {job.guidance_scale:g}, "
        f"shift {job.flow_shift:g}, denoise {job.denoise:g}",
        f"sigmas: {_numbers(record.sigmas, '.4f')}",
        f"timesteps: {_numbers(record.timesteps, 'g')}",
        f"passes: {_passes(record.passes)}",
        *(line for option in job.active(run) for line in option.report(run, record)),
        f"time: {sum(seconds):.1f} s, {sum(steady) / len(steady):.2f} s per step",
        f"memory: {memory}",
    ]
    return "\n".join(lines + [f"note: {warning}" for warning in warnings])


def _numbers(values: Iterable[float], spec: str) -> str:
    return " ".join(format(value, spec) for value in values)


def _passes(passes: Sequence[tuple[str, ...]]) -> str:
    names = sorted({name for step in passes for name in step})
    counts = [f"{sum(name in step for step in passes)} {name}" for name in names]
    return ", ".join(counts)
