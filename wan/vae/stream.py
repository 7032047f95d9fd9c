"""A clip as a stream of chunks through stages of layers; see `wan.vae` for the letters.

Every layer is causal in time and finds the earlier frames it needs in a `Past`, which one stream makes and
drops. How the clip is cut changes no number beyond rounding.
"""

import torch

from .layers import Past

# Frames a stage works on at once: few beside the frames that the caches must hold. Four are what the
# CPU's convolution saves most with (cpu.py).
CHUNK_FRAMES = {"cpu": 4, "cuda": 2}


def frames_per_chunk(chunk_frames, device):
    if chunk_frames is None:
        return CHUNK_FRAMES.get(device.type, CHUNK_FRAMES["cuda"])
    if chunk_frames < 1:
        raise ValueError(f"chunk_frames = {chunk_frames}: it must be at least 1. Use 4, or None (by device).")
    return chunk_frames


def regroup(chunks, size):
    """Cuts and joins a stream of [B, C, f, H, W] into chunks of `size` frames, the last maybe shorter."""
    waiting = []  # lists are popped as they are handed on, so that nobody here holds a used chunk
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


def without_first(chunks, count):
    """Leaves the first `count` frames out of a stream."""
    for chunk in chunks:
        kept = [chunk[:, :, count:]]
        count -= min(count, chunk.shape[2])
        del chunk
        if kept[0].shape[2]:
            yield kept.pop()


def run_stage(layers, chunks, past):
    for x in chunks:
        held = [x]
        del x
        for layer in layers:
            past.check()
            held.append(layer.run(held.pop(), past))
            if not held[0].shape[2]:  # every frame waits for its partner in time
                break
        else:
            yield held.pop()


def in_fast_layout(x):
    """On the CPU, pixels with their channels side by side; elsewhere as it is."""
    return x.contiguous(memory_format=torch.channels_last_3d) if x.device.type == "cpu" else x


def stream(stages, chunks, size, drops=None, check=None):
    """Pulls `chunks` through the stages, cut to `size` frames before each. Yields the results.

    Args:
        drops: How many of the first frames of each stage's result are left out; None is 0 for all.
        check: Called before each layer, on the CPU more often; may raise. None is nothing.
    """
    past = Past(check)
    if not torch.is_grad_enabled():
        chunks = map(in_fast_layout, chunks)
    for layers, drop in zip(stages, drops or [0] * len(stages)):
        chunks = run_stage(layers, regroup(chunks, size), past)
        if drop:
            chunks = without_first(chunks, drop)
    return chunks
