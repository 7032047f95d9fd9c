"""The Triton kernels on a real GPU, at the 14B model's shape: what they differ by, and what they take."""

from functools import partial

import pytest
import torch
from wan21.wan import glue, kernels
from wan21.wan.attention import sdpa
from wan21.wan.config import SIZES, WanConfig
from wan21.wan.dit import WanAttentionBlock
from wan21.wan.kernels import describe
from wan21.wan.rope import axis_frequencies, rope_table
from wan21.wan.vae import WanVAE
from wan21.wan.vae import cuda as vae_cuda
from wan21.wan.vae.norm import RMSNorm

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
GRID = (21, 30, 52)  # 81 frames of 832x480
DTYPES = [torch.bfloat16, torch.float16]
DEVICE = torch.device("cuda", 0)


def milliseconds(call, calls=20):
    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / calls


@pytest.fixture
def choices():
    """The kernels of the 14B model in bfloat16; skips with the reason where there are none."""
    config = SIZES["i2v-14B"]
    found = glue.kernel_choices(DEVICE, torch.bfloat16, config.dim, config.head_dim)
    print(f"\n{torch.cuda.get_device_name()}: {describe(found)}")
    if any(
        why in found["residual_norm"].why for why in ("Triton is not", "NVIDIA", "capability", "C compiler")
    ):
        pytest.skip(found["residual_norm"].why)
    return found


def test_they_are_taken(choices):
    newer = torch.cuda.get_device_capability(DEVICE) > kernels.NEWEST["gelu_product"]
    taken = [name for name, choice in choices.items() if choice.function is not None]
    assert taken == ["residual_norm", "rms_rope", *([] if newer else ["gelu_product"])], describe(choices)


def steps(dtype, rows, width=5120, head_dim=128):
    """{name: (a call of `wan.glue` on the stream, bytes that it has to move)}"""
    rand = partial(torch.randn, device=DEVICE)
    y, q = rand(1, rows, width).to(dtype), rand(1, rows, width).to(dtype)
    shift, scale, gate = (0.3 * rand(1, 1, width) for _ in range(3))
    rms = torch.nn.RMSNorm(width, 1e-6, device=DEVICE, dtype=dtype)
    norm = torch.nn.LayerNorm(width, 1e-6, device=DEVICE)
    table = rope_table(axis_frequencies(head_dim), (rows // 1560, 30, 52), DEVICE)
    heads, token, hidden = width // head_dim, rows * width, 27 * width // 10
    up, gelu = torch.nn.Linear(width, hidden, device=DEVICE, dtype=dtype), glue.GELU()
    return {
        "modulated": (lambda x: glue.modulated(x, shift, scale, 1e-6, dtype), 6 * token),
        "added": (lambda x: glue.added(x, y, gate), 10 * token),
        "added_then_normed": (lambda x: glue.added_then_normed(x, y, gate, norm, dtype), 12 * token),
        "added_then_modulated": (
            lambda x: glue.added_then_modulated(x, y, shift, scale, 1e-6, dtype), 12 * token
        ),
        "normed_heads": (lambda x: glue.normed_heads(q, rms, heads), 4 * token),
        "normed_heads, turned": (lambda x: glue.normed_heads(q, rms, heads, table), 4 * token),
        "product and GELU": (lambda x: glue.activated(q, up, gelu), 2 * token + 2 * rows * hidden),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_on_kernels_give_the_numbers_of_pytorch(choices, monkeypatch, dtype):
    """And print what they take."""
    rows = GRID[0] * GRID[1] * GRID[2]
    x = 3 * torch.randn(1, rows, 5120, device=DEVICE) + 0.5
    cloning = milliseconds(x.clone)
    print(f"copy of the stream: {cloning:.3f} ms, {2 * x.nbytes / cloning / 1e9:.2f} TB/s")
    with torch.no_grad():
        for name, (call, nbytes) in steps(dtype, rows).items():
            ours, took = call(x.clone()), milliseconds(partial(call, x.clone()))
            with monkeypatch.context() as patch:
                patch.setattr(glue, "_takes_kernels", lambda x: False)
                expected, eager = call(x.clone()), milliseconds(partial(call, x.clone()))
            speed = nbytes / took / 1e9
            print(f"{name}: {took:.3f} ms, {speed:.2f} TB/s; PyTorch {eager:.3f} ms")
            for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (ours, expected))):
                error = kernels.relative(a, b)
                assert error <= kernels.TOLERANCE, f"{name}: {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_block_on_kernels(choices, monkeypatch, dtype, batch):
    config = WanConfig(in_dim=36, dim=5120, ffn_dim=1024, num_heads=40, num_layers=1, image_dim=1280)
    g = torch.Generator(DEVICE).manual_seed(0)
    rand = partial(torch.randn, device=DEVICE, generator=g)
    block = WanAttentionBlock(config, torch.nn, device=DEVICE, dtype=dtype).requires_grad_(False)
    for p in block.parameters():
        p.copy_(rand(p.shape) / p[0].numel() ** 0.5)
    block.norm3.float()
    x, modulation = rand(batch, 1560, 5120), rand(batch, 6, 5120)
    text, image = (rand(batch, n, 5120).to(dtype) for n in (512, 257))
    rope = rope_table(axis_frequencies(128), (1, 30, 52), DEVICE)
    with torch.no_grad():
        ours = block(x.clone(), modulation, text, image, rope, sdpa)
        monkeypatch.setattr(glue, "_takes_kernels", lambda x: False)
        expected = block(x.clone(), modulation, text, image, rope, sdpa)
    print(f"relative difference {kernels.relative(ours, expected):.1e}")
    assert 0 < kernels.relative(ours, expected) < kernels.TOLERANCE


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
@pytest.mark.parametrize("width, sides", [(96, (480, 832)), (192, (240, 416)), (384, (60, 104))])
def test_passes_of_the_vae_give_the_numbers_of_pytorch(monkeypatch, dtype, width, sides):
    """And print what they take: each level of a decode of 832x480, a chunk of four frames."""
    found = vae_cuda.kernel_choices(DEVICE, dtype, width)
    if any(choice.function is None for choice in found.values()):
        pytest.skip(f"{torch.cuda.get_device_name()}: {describe(found)}")
    shape, layout = (1, width, 4, *sides), torch.channels_last_3d
    x, y, z = (torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=layout) for _ in "xyz")
    norm = RMSNorm(width, 3, DEVICE, dtype)
    bias, out = torch.randn(width, device=DEVICE).to(dtype), torch.empty_like(x)
    calls = {
        "norm_silu": (lambda y: vae_cuda.norm_silu_into(out, x, norm) or out, 2),
        "add_bias": (lambda y: vae_cuda.add_bias(y, bias), 2),
        "add_bias, residual": (lambda y: vae_cuda.add_bias(y, bias, z), 3),
    }
    with torch.no_grad():
        for name, (call, passes) in calls.items():
            ours, took = call(y.clone()).clone(), milliseconds(partial(call, y.clone()))
            with monkeypatch.context() as patch:
                patch.setattr(vae_cuda, "_kernel", lambda *_: None)
                expected, eager = call(y.clone()).clone(), milliseconds(partial(call, y.clone()))
            speed = passes * x.nbytes / took / 1e9
            print(f"{name}, {width}: {took:.3f} ms, {speed:.2f} TB/s; PyTorch {eager:.3f} ms")
            limit = kernels.TOLERANCE if dtype.itemsize == 2 else kernels.TOLERANCE_IN_FLOAT32
            assert kernels.relative(ours, expected) <= limit, name


def test_longer_chunks_of_the_vae_give_the_same_frames():
    """Four frames at once, as where there is room, beside two."""
    g = torch.Generator(DEVICE).manual_seed(0)
    vae = WanVAE(dim=96, device=DEVICE, dtype=torch.bfloat16).requires_grad_(False)
    for p in vae.parameters():
        p.copy_(torch.randn(p.shape, device=DEVICE, generator=g) / p[0].numel() ** 0.5)
    z = torch.randn(1, 16, 5, 30, 52, device=DEVICE, generator=g).bfloat16()
    x = torch.rand(1, 3, 17, 240, 416, device=DEVICE, generator=g).bfloat16() * 2 - 1
    with torch.no_grad():
        for call, given in ((vae.decode, z), (vae.encode, x)):
            error = kernels.relative(call(given, chunk_frames=4), call(given, chunk_frames=2))
            print(f"relative difference {error:.1e}")
            assert error < 0.02


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32])
def test_the_vae_on_kernels(monkeypatch, dtype):
    """Each kernel is taken; a decode and an encode are those of the plain way."""
    found = vae_cuda.kernel_choices(DEVICE, dtype, 96)
    print(f"\n{torch.cuda.get_device_name()}: {describe(found)}")
    if any(
        word in found["norm_silu"].why for word in ("Triton is not", "NVIDIA", "capability", "C compiler")
    ):
        pytest.skip(found["norm_silu"].why)
    assert all(choice.function is not None for choice in found.values()), describe(found)
    assert vae_cuda.suits(DEVICE, dtype.itemsize)
    g = torch.Generator(DEVICE).manual_seed(0)
    vae = WanVAE(dim=96, device=DEVICE, dtype=dtype).requires_grad_(False)
    for p in vae.parameters():
        p.copy_(torch.randn(p.shape, device=DEVICE, generator=g) / p[0].numel() ** 0.5)
    z = torch.randn(1, 16, 3, 30, 52, device=DEVICE, generator=g).to(dtype)
    x = torch.rand(1, 3, 9, 240, 416, device=DEVICE, generator=g).to(dtype) * 2 - 1
    with torch.no_grad():
        ours = vae.decode(z), vae.encode(x)
        monkeypatch.setattr(vae_cuda, "suits", lambda *_: False)
        for a, b in zip(ours, (vae.decode(z), vae.encode(x))):
            error = kernels.relative(a, b)
            print(f"relative difference {error:.1e}")
            assert error < (2e-3 if dtype == torch.float32 else 0.03)  # TF32; 16 bits
