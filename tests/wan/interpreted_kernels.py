"""The Triton kernels in Triton's interpreter, beside PyTorch's own operations: prints what was found as JSON.

Run by test_kernels.py in a process of its own, because TRITON_INTERPRET is read when Triton is imported.

Differences are told in units of the last place of what was added up: where a sum comes out near 0, its own
last place says nothing of it.
"""

import itertools
import json

import torch
import torch.nn.functional as F
import triton.language as tl
from triton.runtime import interpreter
from wan21.wan import fp8_rows, glue, kernels
from wan21.wan.attention import sdpa
from wan21.wan.chunked import block_executor
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanAttentionBlock
from wan21.wan.kernels.add_bias import add_bias
from wan21.wan.kernels.norm_silu import norm_silu
from wan21.wan.kernels.quantise_rows import quantise_rows
from wan21.wan.kernels.residual_norm import residual_norm
from wan21.wan.kernels.rms_rope import rms_rope
from wan21.wan.rope import apply_rope, axis_frequencies, rope_table
from wan21.wan.vae import cuda
from wan21.wan.vae.norm import RMSNorm

EPS = 1e-6
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SIZES = [(1, 6, 40, 128), (2, 6, 3, 64)]  # B, L, N, D/N: the 14B model's width, and one of no power of two
g = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, generator=g)


def as_a_gpu_rounds():
    """The interpreter cuts float32 to bfloat16 and errs on small fp8; a GPU rounds to the nearest."""
    cut = interpreter.InterpreterBuilder.create_fp_trunc
    to_fp8 = interpreter.InterpreterBuilder.create_fp_to_fp

    def rounded(self, value, dtype):
        if dtype.scalar != tl.bfloat16:
            return cut(self, value, dtype)
        numbers = torch.from_numpy(value.data).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(numbers, dtype.scalar)

    def rounded_to_fp8(self, value, dtype, mode):
        if dtype.scalar != tl.float8e4nv:
            return to_fp8(self, value, dtype, mode)
        numbers = torch.from_numpy(value.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(numbers, dtype.scalar)

    interpreter.InterpreterBuilder.create_fp_trunc = rounded
    interpreter.InterpreterBuilder.create_fp_to_fp = rounded_to_fp8


def compared(ours, expected, size):
    """How many numbers there are and how many are equal, less what comes out near 0; and the largest
    difference of any in units of the last place of `size`, what was added up."""
    unit = torch.finfo(expected.dtype).eps * 2.0 ** size.float().abs().clamp(min=1e-30).log2().floor()
    off = (ours.float() - expected.float()).abs() / unit
    sums = expected.abs() >= size / 4
    same = (ours == expected)[sums].sum().item()
    wide = expected.dtype == torch.float32
    return {"equal": same, "of": sums.sum().item(), "units": off.max().item(), "wide": wide}


def normed(x, weight, bias, dtype):
    """LayerNorm by the formula, exactly, rounded once; and what is added up in it."""
    x = x.double()
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    return (x * weight + bias).to(dtype), (x * weight).abs() + bias.abs()


def residual_cases(dtype, batch, rows, width):
    x, y = 3 * rand(batch, rows, width) + 0.5, rand(batch, rows, width).to(dtype)
    gate, shift, scale = (0.3 * rand(batch, 1, width) for _ in range(3))
    affine = 1 + scale, shift
    yield "norm", compared(residual_norm(x, None, None, affine, EPS, dtype), *normed(x, *affine, dtype))
    for name, factor in (("gated", gate), ("plain", None)):
        ours, alone, expected = x.clone(), x.clone(), glue._added(x.clone(), y, factor)
        out = residual_norm(ours, y, factor, affine, EPS, dtype)
        assert residual_norm(alone, y, factor, None, EPS, dtype) is None
        size = x.abs() + (y if factor is None else y * factor).abs()
        yield f"{name} step", compared(ours, expected, size)
        yield f"{name} step alone", compared(alone, expected, size)
        yield f"norm of the {name} step", compared(out, *normed(ours, *affine, dtype))
    affine = 1 + 0.1 * rand(width), rand(width)  # of a layer: the same for all samples
    yield (
        "layer's norm",
        compared(residual_norm(x, None, None, affine, EPS, dtype), *normed(x, *affine, dtype)),
    )


def rope_cases(dtype, batch, rows, heads, head_dim):
    width = heads * head_dim
    x, weight = rand(batch, rows, width).to(dtype), (1 + 0.1 * rand(width)).to(dtype)
    table = rope_table(axis_frequencies(head_dim), (1, rows // 3, 3))
    before = x.clone()
    expected = F.rms_norm(x, (width,), weight, EPS).unflatten(-1, (heads, -1))
    yield "heads' norm", compared(rms_rope(x, weight, EPS, heads, None), expected, expected)
    length = expected.float().unflatten(-1, (-1, 2)).norm(dim=-1).repeat_interleave(2, dim=-1)
    turned = apply_rope(expected.clone(), table)
    yield "turned", compared(rms_rope(x, weight, EPS, heads, table), turned, length)
    assert torch.equal(x, before)


def channels_last(*shape, dtype):
    return rand(*shape).to(dtype).contiguous(memory_format=cuda.CHANNELS_LAST)


def vae_cases(dtype, width):
    """On two samples of more pixels than a program has, and not a multiple of them."""
    shape = 2, width, 3, 5, 7
    x, residual = channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    x[0, :, 0, 0, 0], x[1, :, 0, 0, 0] = 0, 6e-8  # the smallest number of float16
    norm = RMSNorm(width, 3, dtype=dtype)
    norm.gamma.copy_(1 + 0.1 * rand(*norm.gamma.shape))
    window = torch.full((2, width, 5, 5, 7), 9.0, dtype=dtype).contiguous(memory_format=cuda.CHANNELS_LAST)
    norm_silu(x, norm.gamma.flatten(), norm.scale, window[:, :, 2:])
    assert (window[:, :, :2] == 9).all()  # what is before keeps its numbers
    wide = x.double()
    factor = (norm.scale / wide.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(torch.finfo(dtype).max)
    normed = wide * factor * norm.gamma.double()
    yield "norm and SiLU", compared(window[:, :, 2:], F.silu(normed).to(dtype), normed)
    bias = rand(width).to(dtype)
    for name, add_to in (("bias", None), ("bias and residual", residual)):
        ours, expected = x.clone(), x + bias.view(-1, 1, 1, 1)
        size = x.abs() + bias.abs().view(-1, 1, 1, 1)
        add_bias(ours, bias, add_to)
        if add_to is not None:
            expected, size = expected + add_to, size + add_to.abs()
        yield name, compared(ours, expected, size)
    yield "off", cuda_distances(dtype, width)


def cuda_distances(dtype, width):
    """What the check of a first use finds."""
    device = torch.device("cpu")
    return {
        "norm_silu": cuda._norm_silu_distance(device, dtype, width, norm_silu),
        "add_bias": cuda._add_bias_distance(device, dtype, width, add_bias),
    }


def rows_in_fp8():
    """Rows in fp8 beside the reference: how far apart the scales are, and the numbers in steps of fp8."""
    for (name, dtype), width, gelu in itertools.product(DTYPES.items(), (5120, 13824, 200), (False, True)):
        x = (rand(5, width) * torch.tensor([1e-3, 1, 3, 50, 0])[:, None]).to(dtype)
        ours, scale = quantise_rows(x, gelu)
        expected, of = fp8_rows._quantised_rows(x, gelu)
        a, b = (t.float() * s for t, s in ((ours, scale), (expected, of)))
        step = b.abs().clamp_min(of / 64) / 8  # the largest between two numbers of three bits
        yield (
            f"{name}, width {width}, gelu {gelu}",
            {
                "scale": ((scale - of).abs() / of).max().item(),
                "steps": ((a - b).abs() / step).max().item(),
                "equal": (ours.view(torch.uint8) == expected.view(torch.uint8)).float().mean().item(),
            },
        )


def traffic():
    """Bytes that each kernel loads and stores for one token of the 14B model."""
    moved = []

    def counted(name):
        call = getattr(interpreter.InterpreterBuilder, name)

        def run(self, pointers, *others):
            mask = others[1] if name.endswith("store") else others[0]
            moved.append(int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8)
            return call(self, pointers, *others)

        setattr(interpreter.InterpreterBuilder, name, run)

    counted("create_masked_load"), counted("create_masked_store")
    half, width = torch.float16, 5120
    x, y, vector = rand(1, 1, width), rand(1, 1, width).half(), rand(1, 1, width)
    q, table = rand(1, 1, width).half(), rand(1, 1, 64, 2)
    pixel, gamma = channels_last(1, 96, 1, 1, 1, dtype=half), rand(96).half()
    calls = {
        "norm and SiLU of a pixel": lambda: norm_silu(pixel, gamma, 9.8, torch.empty_like(pixel)),
        "bias and residual of a pixel": lambda: add_bias(pixel, gamma, pixel.clone()),
        "norm": lambda: residual_norm(x, None, None, (vector, vector), EPS, half),
        "gated step and norm": lambda: residual_norm(x, y, vector, (vector, vector), EPS, half),
        "step and norm": lambda: residual_norm(x, y, None, (vector, vector), EPS, half),
        "gated step": lambda: residual_norm(x, y, vector, None, EPS, half),
        "heads' norm": lambda: rms_rope(q, vector[0, 0].half(), EPS, 40, None),
        "turned": lambda: rms_rope(q, vector[0, 0].half(), EPS, 40, table),
        "rows in fp8": lambda: quantise_rows(q[0], True),
    }
    for name, call in calls.items():
        moved.clear()
        call()
        yield name, sum(moved)


def blocks():
    """A whole block on the kernels beside one without: relative difference, and how often kernels ran."""
    ran = []
    kernels.obstacle = lambda name, *_: "no GPU" if name == "gelu_product" else None
    glue.CHECK_TOKENS = 4
    config = WanConfig(in_dim=36, dim=192, ffn_dim=256, num_heads=3, num_layers=1, image_dim=64)
    block = WanAttentionBlock(config, torch.nn, dtype=torch.float16)
    for p in block.parameters():
        p.copy_(rand(*p.shape) / p[0].numel() ** 0.5)
    block.norm3.float()
    text, image = rand(1, 7, 192).half(), rand(1, 5, 192).half()
    rope = rope_table(axis_frequencies(64), (1, 3, 4))
    choose = kernels.choose

    def watched(name, *args):
        ran.append(name)
        return choose(name, *args)

    for batch, parts in ((1, 1), (1, 3), (2, 1)):
        x, modulation = rand(batch, 12, 192), rand(batch, 6, 192)
        inputs = modulation, text.expand(batch, -1, -1), image.expand(batch, -1, -1), rope, sdpa
        kernels.choose = lambda *_: kernels.Choice(None)
        expected = block_executor(parts)(block, x.clone(), *inputs)
        kernels.choose = watched
        ran.clear()
        ours = block_executor(parts)(block, x.clone(), *inputs)
        assert not torch.equal(ours, expected)
        yield f"batch {batch}, parts {parts}", {"off": kernels.relative(ours, expected), "ran": len(ran)}
    yield "taken", {str(key[0]): choice.function is not None for key, choice in kernels._chosen.items()}


@torch.no_grad()
def main():
    as_a_gpu_rounds()
    numbers = {}
    for (name, dtype), (batch, rows, heads, head_dim) in itertools.product(DTYPES.items(), SIZES):
        where = f"{name}, width {heads * head_dim}"
        for what, found in residual_cases(dtype, batch, rows, heads * head_dim):
            numbers[f"{where}: {what}"] = found
        for what, found in rope_cases(dtype, batch, rows, heads, head_dim):
            numbers[f"{where}: {what}"] = found
    vae = {
        f"{name}, width {width}: {what}": found
        for name, dtype in {**DTYPES, "float32": torch.float32}.items()
        for width in (96, 8)
        for what, found in vae_cases(dtype, width)
    }
    found = {"numbers": numbers, "vae": vae, "rows": dict(rows_in_fp8())}
    print(json.dumps(found | {"blocks": dict(blocks()), "traffic": dict(traffic())}))


main()
