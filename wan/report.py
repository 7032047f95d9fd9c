"""The sampler's report: what was run, in sentences that fit a text preview."""

from .conditioning import pixel_frames
from .config import VAE_STRIDE


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
        f"time: {sum(seconds):.1f} s, {sum(steady) / len(steady):.2f} s per step",
        f"memory: {memory}",
    ]
    return "\n".join(lines + [f"note: {warning}" for warning in warnings])


def _numbers(values, spec):
    return " ".join(format(value, spec) for value in values)


def _passes(passes):
    names = sorted({name for step in passes for name in step})
    counts = [f"{sum(name in step for step in passes)} {name}" for name in names]
    return ", ".join(counts)
