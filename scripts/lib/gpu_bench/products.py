"""The matrix products of a block in 16 and in 8 bits, and what GELU costs beside them."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench import Bench, Missing, Race, Row

LARGEST = 448.0  # of float8_e4m3fn
WARM_S = 4.0  # of work before a product is timed again: a warm card is a slower card


def rows(bench: Bench) -> Iterator[Row]:
    """For each shape the dtype of the model first; what is put beside it quantises its input unless noted."""
    config, tokens = bench.size.config, bench.size.tokens
    name = str(bench.dtype).removeprefix("torch.")
    for width, out in ((config.dim, config.dim), (config.dim, config.ffn_dim), (config.ffn_dim, config.dim)):
        x, w, b = bench.random(tokens, width), bench.random(out, width, scale=width**-0.5), bench.random(out)
        shape, work = f"{width} -> {out}", 2 * tokens * width * out / 1e12
        ways = {name: partial(F.linear, x, w, b), "float16": _in_half(x, w, b)}
        makers = {f"{shape} {way}": lambda call=call: call for way, call in ways.items()}
        makers |= {f"{shape} {way}": partial(make, bench, x, w, b) for way, make in EIGHT_BITS.items()}
        yield from bench.race(
            Race(makers, "ms", work=work, notes={f"{shape} {k}": v for k, v in NOTES.items()})
        )
        if (width, out) == (config.dim, config.ffn_dim):
            yield from bench.race(Race(_gelu(bench, shape, x, w, b), "ms", work=work))
            warm = {f"{shape} {name}, after {WARM_S:g} s": lambda x=x, w=w, b=b: _warm(bench, x, w, b)}
            yield from bench.race(Race(warm, "ms", work=work))
        del x, w, b, ways, makers


def _in_half(x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    return partial(F.linear, x.half(), w.half(), b.half())


def _gelu(bench: Bench, shape: str, x: Tensor, w: Tensor, b: Tensor) -> dict[str, Callable]:
    def in_the_product():
        if not bench.on_cuda:
            raise Missing("the product's own GELU is the CUDA library's")
        return lambda: torch._addmm_activation(b, x, w.t(), use_gelu=True)

    after = lambda: F.gelu(F.linear(x, w, b), approximate="tanh")  # noqa: E731
    return {f"{shape}, then GELU": lambda: after, f"{shape}, GELU in the product": in_the_product}


def _warm(bench: Bench, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    if not bench.on_cuda:
        raise Missing("a card's clock falls while it works; this is none")
    end = time.monotonic() + WARM_S
    while time.monotonic() < end:
        F.linear(x, w, b)
        torch.cuda.synchronize()
    return partial(F.linear, x, w, b)


def _need_fp8(bench: Bench) -> None:
    import comfy.model_management

    if not comfy.model_management.supports_fp8_compute(bench.device):
        raise Missing("fp8 products take an NVIDIA GPU of compute capability 8.9 or newer")


def _fp8_tensor(bench: Bench, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """One scale for all; the input's is worked out at each call, which is part of the price."""
    _need_fp8(bench)
    scale_w = w.abs().amax().float() / LARGEST
    packed = (w / scale_w).to(torch.float8_e4m3fn).t()

    def call():
        scale_x = x.abs().amax().float() / LARGEST
        narrow = (x / scale_x).to(torch.float8_e4m3fn)
        return torch._scaled_mm(narrow, packed, scale_a=scale_x, scale_b=scale_w, bias=b, out_dtype=x.dtype)

    return call


def _fp8_tensor_product(bench: Bench, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The product alone, its input narrow already."""
    _need_fp8(bench)
    scales = [t.abs().amax().float() / LARGEST for t in (x, w)]
    narrow, packed = ((t / s).to(torch.float8_e4m3fn) for t, s in zip((x, w), scales))
    how = dict(scale_a=scales[0], scale_b=scales[1], bias=b, out_dtype=x.dtype, use_fast_accum=True)
    return lambda: torch._scaled_mm(narrow, packed.t(), **how)


def _fp8_row_product(bench: Bench, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The product alone, a scale for each row of the input and of the weight."""
    _need_fp8(bench)
    scales = [t.abs().amax(1, keepdim=True).float() / LARGEST for t in (x, w)]
    narrow, packed = ((t / s).to(torch.float8_e4m3fn) for t, s in zip((x, w), scales))
    how: dict[str, Any] = dict(scale_a=scales[0], scale_b=scales[1].t().contiguous(), bias=b)
    return lambda: torch._scaled_mm(narrow, packed.t(), **how, out_dtype=x.dtype, use_fast_accum=True)


def _int8(rotated: bool, bench: Bench, x: Tensor, w: Tensor, b: Tensor) -> Callable[[], Tensor]:
    """The host's: a scale for each row of the input and each channel of the weight."""
    import comfy.quant_ops

    if not comfy.quant_ops._CK_AVAILABLE:
        raise Missing("comfy-kitchen is not installed")
    kitchen = comfy.quant_ops.ck
    packed, params = kitchen.tensor.TensorWiseINT8Layout.quantize(w, per_channel=True, convrot=rotated)
    return lambda: kitchen.int8_linear(x, packed, params.scale, b, x.dtype, convrot=rotated)


EIGHT_BITS: dict[str, Callable[..., Callable[[], Tensor]]] = {
    "int8": partial(_int8, False),
    "int8, rotated": partial(_int8, True),
    "fp8, one scale": _fp8_tensor,
    "fp8, one scale, product alone": _fp8_tensor_product,
    "fp8, a scale a row, product alone": _fp8_row_product,
}
NOTES = {name: "its input is narrow already" for name in EIGHT_BITS if name.endswith("alone")}
