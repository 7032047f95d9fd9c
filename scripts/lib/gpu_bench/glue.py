"""The work between the products, PyTorch's own operations beside our kernels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .bench import Bench, Race, Row
from .kernels import check_taken, glue, in_eager

EPS = 1e-6


def rows(bench: Bench) -> Iterator[Row]:
    """A race a function; the rate is of the bytes that must be moved at least."""
    module = glue()
    for name, (call, numbers) in _functions(bench, module).items():
        tera_bytes = numbers * bench.size.tokens * bench.size.config.dim / 1e12
        makers = {
            f"{name}, eager": partial(in_eager, call),
            f"{name}, kernel": partial(_taken, bench, call),
        }
        yield from bench.race(Race(makers, "ms", work=tera_bytes, rate_unit="TB/s"))


def _taken(bench: Bench, call: Callable[[], Any]) -> Callable[[], Any]:
    check_taken(bench)
    return call


def _functions(bench: Bench, module: Any) -> dict[str, tuple[Callable[[], Any], int]]:
    """By name: a call, and the bytes it must move for each number of the stream.

    The stream is float32; what goes into a product or comes from one has e bytes.
    """
    from wan21.wan.rope import axis_frequencies, rope_table

    size = bench.size
    dim, heads, e = size.config.dim, size.config.num_heads, bench.dtype.itemsize
    x = bench.random(1, size.tokens, dim, dtype=torch.float32)
    y = bench.random(1, size.tokens, dim)
    # Small, so that a stream that is added to hundreds of times stays finite.
    gate, shift, scale = (bench.random(1, 1, dim, dtype=torch.float32, scale=0.01) for _ in range(3))
    affine = nn.LayerNorm(dim, EPS, device=bench.device)
    rms = nn.RMSNorm(dim, EPS, device=bench.device, dtype=bench.dtype)
    frames, height, width = size.latent
    table = rope_table(axis_frequencies(size.config.head_dim), (frames, height // 2, width // 2), x.device)

    def last(call: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        """The tensor that is compared: of two the normed one."""

        def run():
            found = call(*args)
            return found[-1] if isinstance(found, tuple) else found

        return run

    return {
        "modulated": (last(module.modulated, x, shift, scale, EPS, bench.dtype), 4 + e),
        "added, gated": (last(module.added, x.clone(), y, gate), 8 + e),
        "added, then modulated": (
            last(module.added_then_modulated, x.clone(), y, shift, scale, EPS, bench.dtype),
            8 + 2 * e,
        ),
        "added, then normed": (
            last(module.added_then_normed, x.clone(), y, gate, affine, bench.dtype),
            8 + 2 * e,
        ),
        "RMSNorm": (last(module.normed_heads, y, rms, heads), 2 * e),
        "RMSNorm and RoPE": (last(module.normed_heads, y, rms, heads, table), 2 * e),
    }
