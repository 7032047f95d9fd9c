"""Peaks of the device beside our estimates (`wan/memory.py`, `wan/vae/memory.py`)."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..peers import random_dit, random_vae
from .bench import GIB, PASSES, Bench, Row, Size, failure
from .dit import inputs

TILES = (None, 256, 128)
NO_PEAK = "peaks are known on CUDA alone"


def rows(bench: Bench) -> Iterator[Row]:
    """The value is the estimate, its ratio to the peak."""
    yield from _steps(bench)
    bench.clear()
    yield from _vae(bench)


def step_estimate(size: Size, plan: Any) -> float:
    """Bytes of the model's own call: the estimate less what the sampler holds outside of it."""
    from wan21.wan.memory import LATENT_COPIES, StepSize, step_bytes

    config, passes = size.config, 2 if plan.joint else 1
    step = StepSize(
        config, (1, 16, *size.latent), text_tokens=size.text_tokens, image_tokens=size.image_tokens
    )
    outside = 16 * step.tokens * (16 * (LATENT_COPIES + 2) + passes * 2 * config.in_dim)
    return step_bytes(step, plan) - outside


def _steps(bench: Bench) -> Iterator[Row]:
    from wan21.wan.attention import best_kernels
    from wan21.wan.chunked import block_executor
    from wan21.wan.memory import PARTS, MemoryPlan

    model = random_dit(bench.size.config, bench.device, bench.dtype)
    both = inputs(bench)
    for plan in (MemoryPlan(), MemoryPlan(True, PARTS), MemoryPlan(False, PARTS)):
        passes = PASSES if plan.joint else PASSES[:1]
        given = [part[: len(passes)] for part in both]

        def call(passes=passes, given=given, plan=plan):
            with best_kernels(bench.device):
                return model(*given, pass_names=passes, execute=block_executor(plan.parts))

        yield _row(bench, f"step, {plan}", step_estimate(bench.size, plan), call)


def _vae(bench: Bench) -> Iterator[Row]:
    from wan21.wan.vae.fallback import decode_within_memory
    from wan21.wan.vae.memory import decode_bytes, encode_bytes

    vae: Any = random_vae(bench.size.vae_dim, bench.device, bench.dtype)
    frames, height, width = bench.size.clip
    z = bench.random(1, 16, min(3, (frames - 1) // 4 + 1), height // 8, width // 8)
    out = torch.empty(vae.decode_output_shape(z.shape))
    for tile in TILES:
        estimate = decode_bytes(vae, height // 8, width // 8, z.device, tile)
        name = f"decode, {f'tiles of {tile}' if tile else 'whole frames'}"
        yield _row(bench, name, estimate, partial(decode_within_memory, vae, z, out, tile))
    for count in (1, min(17, frames)):
        x = torch.zeros(1, 3, count, height, width, device=bench.device, dtype=bench.dtype)
        estimate = encode_bytes(vae, count, height, width, x.device)
        yield _row(bench, f"encode, frames: {count}", estimate, partial(vae.encode, x))


def _row(bench: Bench, name: str, estimate: float, call: Callable[[], Any]) -> Row:
    row = Row(name, estimate / GIB, "GiB", note="estimated")
    try:
        bench.check_time()
        row.peak_gib = bench.peak(call)
    except Exception as error:
        row.skipped = failure(error)
        bench.clear()
    if row.peak_gib is None:
        row.note = f"estimated; {NO_PEAK}"
    else:
        row.ratio, row.beside = estimate / GIB / row.peak_gib, "the peak"
    return row
