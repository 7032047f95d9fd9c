"""The work between the products, PyTorch's own operations beside our kernels."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from wan21.wan.rope import axis_frequencies, rope_table

from .bench import Bench, Call, Race, Row
from .kernels import check_taken, glue, in_eager

EPS = 1e-6


def rows(bench: Bench) -> Iterator[Row]:
    """A race a function; the rate is of the bytes that must be moved at least."""
    module = glue()
    for name, (make, numbers) in _functions(bench, module).items():
        tera_bytes = numbers * bench.size.tokens * bench.size.config.dim / 1e12
        makers = {
            f"{name}, eager": lambda make=make: in_eager(make()),
            f"{name}, kernel": partial(_taken, bench, make),
        }
        yield from bench.race(Race(makers, "ms", work=tera_bytes, rate_unit="TB/s"))


def _taken(bench: Bench, make: Callable[[], Call]) -> Call:
    check_taken(bench)
    return make()


def _functions(bench: Bench, module: Any) -> dict[str, tuple[Callable[[], Call], int]]:
    """By name: what makes a call, and the bytes it must move for each number of the stream.

    The stream is float32; what goes into a product or comes from one has e bytes. Each call has a stream of
    its own, which it changes.
    """
    size = bench.size
    dim, heads, e, to = size.config.dim, size.config.num_heads, bench.dtype.itemsize, bench.dtype
    x = bench.random(1, size.tokens, dim, dtype=torch.float32)
    y = bench.random(1, size.tokens, dim)
    # Small, so that a stream that is added to hundreds of times stays finite.
    gate, shift, scale = (bench.random(1, 1, dim, dtype=torch.float32, scale=0.01) for _ in range(3))
    affine = nn.LayerNorm(dim, EPS, device=bench.device)
    rms = nn.RMSNorm(dim, EPS, device=bench.device, dtype=to)
    frames, height, width = size.latent
    table = rope_table(axis_frequencies(size.config.head_dim), (frames, height // 2, width // 2), x.device)
    return {
        "modulated": (lambda: partial(module.modulated, x, shift, scale, EPS, to), 4 + e),
        "added, gated": (lambda: partial(module.added, x.clone(), y, gate), 8 + e),
        "added, then modulated": (
            lambda: _normed(module.added_then_modulated, x.clone(), y, shift, scale, EPS, to),
            8 + 2 * e,
        ),
        "added, then normed": (
            lambda: _normed(module.added_then_normed, x.clone(), y, gate, affine, to),
            8 + 2 * e,
        ),
        "RMSNorm": (lambda: partial(module.normed_heads, y, rms, heads), 2 * e),
        "RMSNorm and RoPE": (lambda: partial(module.normed_heads, y, rms, heads, table), 2 * e),
    }


def _normed(function: Callable[..., Any], *args: Any) -> Call:
    """Of what it gives, the stream and that normed, the latter."""
    return lambda: function(*args)[1]
