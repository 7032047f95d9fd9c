"""A clip as a stream of chunks through stages of layers; see `wan.vae` for the letters.

Every layer is causal in time and finds the earlier frames it needs in a `Past`, which lives as long as one
stream. How the clip is cut changes no number beyond rounding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from . import cuda
from .cpu import CpuPast
from .layers import Layer, Stage
from .past import Check, Past, RecordedPast

# Frames a stage works on at once: few beside the frames that the caches must hold. With four, the CPU's
# convolution saves most (cpu.py).
CHUNK_FRAMES = {"cpu": 4, "cuda": 2}


def frames_per_chunk(chunk_frames: int | None, device: torch.device) -> int:
    """Frames to work on at once on `device`; None is the best for it."""
    if chunk_frames is None:
        return CHUNK_FRAMES.get(device.type, CHUNK_FRAMES["cuda"])
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames = {chunk_frames}: it must be at least 1. Use 4, or None (by device).")
    return chunk_frames


def new_past(
    device: torch.device, dtype: torch.dtype, check: Check | None, is_plain: Callable[[nn.Module], bool]
) -> Past:
    """The `Past` for a stream of `dtype` on `device`; `is_plain` as for `CpuPast`."""
    if torch.is_grad_enabled():
        return RecordedPast(check)
    if cuda.suits(device, dtype.itemsize):
        return cuda.CudaPast(check)
    return CpuPast(check, is_plain) if device.type == "cpu" else Past(check)


def regroup(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Cuts and joins a stream of [B, C, f, H, W] into chunks of `size` frames, the last maybe shorter."""
    waiting = []  # chunks are popped as they are handed on, so that nothing here keeps a used one alive
    for chunk in chunks:
        waiting.append(chunk)
        del chunk
        if sum(part.shape[2] for part in waiting) >= size:
            joined = waiting[0] if len(waiting) == 1 else torch.cat(waiting, 2)
            waiting = [*joined.split(size, 2)]
            del joined
            while waiting and waiting[0].shape[2] == size:
                yield waiting.pop(0)
    if waiting:
        yield torch.cat(waiting, 2)


def without_first(chunks: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Leaves the first `count` frames out of a stream."""
    for chunk in chunks:
        kept = [chunk[:, :, count:]]
        count -= min(count, chunk.shape[2])
        del chunk
        if kept[0].shape[2]:
            yield kept.pop()


def run_stage(layers: Sequence[Layer], chunks: Iterable[Tensor], past: Past) -> Iterator[Tensor]:
    """Every chunk through all the layers; none comes out where every frame waits for its partner in time."""
    for x in chunks:
        held = [x]
        del x
        for layer in layers:
            past.check()
            held.append(layer.run(held.pop(), past))
            if not held[0].shape[2]:
                break
        else:
            yield held.pop()


def stream(
    stages: Sequence[Stage],
    chunks: Iterable[Tensor],
    size: int,
    past: Past,
    drops: Sequence[int] | None = None,
) -> Iterator[Tensor]:
    """Pulls chunks through the stages, one stage after the other, each chunk as far as it goes.

    Args:
        stages: as of `Encoder.stages` and `Decoder.stages`.
        chunks: [B, C, f, H, W] of any f.
        size: frames of the chunks that each stage works on.
        past: new, for this stream alone.
        drops: how many of the first frames of each stage's result are left out; None for none.

    Returns:
        an iterator of chunks of the result, which does the work
    """
    results: Iterable[Tensor] = map(past.arrange, chunks)
    for layers, drop in zip(stages, drops or [0] * len(stages)):
        results = run_stage(layers, regroup(results, size), past)
        if drop:
            results = without_first(results, drop)
    return iter(results)
