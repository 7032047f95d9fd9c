"""What only a CUDA device can show: 16-bit parity, and memory that does not grow with the frames."""

import pytest
import torch
from lib.gpu_bench.bench import gpu_size
from lib.gpu_bench.memory import step_estimate
from wan21.wan.attention import AttentionSize, best_kernels, sdpa
from wan21.wan.backends import BACKENDS, choose_attention, named_attention
from wan21.wan.chunked import block_executor
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.memory import MemoryPlan
from wan21.wan.vae import WanVAE
from wan21.wan.vae.fallback import decode_within_memory
from wan21.wan.vae.memory import decode_bytes, encode_bytes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def fill_randomly(module, seed=0):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        p.copy_(torch.randn(p.shape, generator=g) / fan_in**0.5 if p.ndim > 1 else torch.ones_like(p))
    return module.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dit_in_16_bit_is_near_float32(dtype):
    import comfy.ops

    config = WanConfig(in_dim=36, dim=512, ffn_dim=1024, num_heads=4, num_layers=4, image_dim=1280)
    exact = fill_randomly(WanModel(config, torch.nn)).cuda()
    half = WanModel(config, comfy.ops.manual_cast, dtype=dtype).cuda().eval()
    half.load_state_dict(exact.state_dict())
    x, t = torch.randn(1, 36, 5, 30, 52).cuda(), torch.tensor([700.0]).cuda()
    text, clip = torch.randn(1, 512, 4096).cuda(), torch.randn(1, 257, 1280).cuda()
    expected = exact(x, t, text, clip)
    error = (half(x, t, text.to(dtype), clip.to(dtype)) - expected).norm() / expected.norm()
    assert error < 0.02


def test_multiplication_in_fp8_is_near_that_of_fp8_weights(tmp_path):
    import comfy.model_management
    from lib.random_checkpoints import T2V, make_checkpoints
    from wan21 import host

    if not comfy.model_management.supports_fp8_compute(torch.device("cuda", 0)):
        pytest.skip("this device does not multiply in fp8")
    path = make_checkpoints(tmp_path) / "diffusion_models" / T2V
    outs = []
    for weight_dtype in ("fp8_e4m3fn", "fp8_e4m3fn_fast"):
        patcher = host.load_model(path, weight_dtype)
        comfy.model_management.load_models_gpu([patcher])
        g = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 16, 3, 32, 32, generator=g), torch.randn(1, 512, 128, generator=g)
        t = torch.tensor([700.0], device="cuda")
        outs.append(patcher.model.diffusion_model(x.cuda(), t, text.to("cuda", torch.bfloat16)).float())
    assert 0 < (outs[1] - outs[0]).norm() < 0.2 * outs[0].norm()


@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_vae_memory_does_not_grow_with_the_frames(direction):
    vae = fill_randomly(WanVAE(dim=32)).cuda()

    def peak(latent_frames):
        frames = 4 * (latent_frames - 1) + 1
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        if direction == "encode":
            vae.encode(torch.zeros(1, 3, frames, 128, 128), device="cuda")
        else:
            out = torch.empty(1, 3, frames, 128, 128)
            vae.decode(torch.zeros(1, 16, latent_frames, 16, 16, device="cuda"), output_buffer=out)
        return torch.cuda.max_memory_allocated()

    peak(3)
    assert peak(41) < 1.1 * peak(11)


def test_vae_on_cuda_equals_the_cpu():
    vae = fill_randomly(WanVAE(dim=16))
    z = torch.randn(1, 16, 3, 6, 5)
    expected = vae.decode(z)
    ours = vae.cuda().decode(z.cuda()).cpu()
    assert ((ours - expected).norm() / expected.norm()).item() < 1e-3  # TF32 convolutions


@pytest.mark.parametrize("tile", [None, 256, 128])
def test_vae_takes_what_is_estimated(tile):
    vae = fill_randomly(WanVAE(dtype=torch.bfloat16)).cuda()
    z = torch.randn(1, 16, 3, 60, 104, device="cuda", dtype=torch.bfloat16)
    out = torch.empty(vae.decode_output_shape(z.shape))
    decode_within_memory(vae, z, out, tile)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    decode_within_memory(vae, z, out, tile)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.4 < taken / decode_bytes(vae, 60, 104, z.device, tile) <= 1


@pytest.mark.parametrize("frames", [1, 17])
def test_vae_encode_takes_what_is_estimated(frames):
    vae = fill_randomly(WanVAE(dtype=torch.bfloat16)).cuda()
    x = torch.zeros(1, 3, frames, 480, 832, device="cuda", dtype=torch.bfloat16)
    vae.encode(x)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    vae.encode(x)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.4 < taken / encode_bytes(vae, frames, 480, 832, x.device) <= 1


def test_vae_goes_on_when_memory_really_runs_out():
    vae = fill_randomly(WanVAE(dim=32)).cuda()
    z = torch.randn(1, 16, 3, 40, 40, device="cuda")
    expected = torch.empty(vae.decode_output_shape(z.shape))
    vae.decode(z, output_buffer=expected)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    allowed = torch.cuda.memory_reserved() + decode_bytes(vae, 40, 40, z.device, 128)
    out, said = torch.empty_like(expected), []
    torch.cuda.set_per_process_memory_fraction(allowed / total)
    try:
        decode_within_memory(vae, z, out, None, lambda text: (said.append(text), torch.cuda.empty_cache()))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert said
    assert ((out - expected).norm() / expected.norm()).item() < 1e-3  # TF32 convolutions


def test_vae_decode_beside_the_native_one():
    """81 frames of 480x832: the time aimed at; memory in tiles of 512 is 0.55 of native's by count."""
    from bench import measure

    row = measure("vae-tiles", "cuda", 3, quick=False)
    seconds, used = row["seconds"], row["memory_mib"]
    assert seconds["ours"] <= 0.7 * seconds["native"], row
    assert seconds["tiles 512"] <= 0.7 * seconds["native"], row
    assert used["tiles 512"] <= 0.6 * used["native"], row


def exact_attention(q, k, v):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sdpa", *BACKENDS])
@pytest.mark.parametrize("keys", [1560, 512, 257])
def test_every_attention_backend_is_near_exact_in_16_bit(name, dtype, keys):
    try:
        chosen = named_attention(name, torch.device("cuda", 0), dtype, 128)
    except ValueError as error:
        pytest.skip(str(error))
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 4, 128, generator=g).to("cuda", dtype) for n in (1560, keys, keys))
    with best_kernels(q.device):
        out = chosen.function(q, k, v)
    expected = exact_attention(q, k, v)
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (0.1 if chosen.quantised else 0.02)


def test_auto_takes_a_backend_that_agrees_and_is_fast():
    """At the tokens of 81 frames of 832x480, of which a quarter of the heads."""
    device, size = torch.device("cuda", 0), AttentionSize(32760, 10, 128)
    chosen = choose_attention("auto", device, torch.bfloat16, size)
    q, k, v = (torch.randn(1, 900, 2, 128).to("cuda", torch.bfloat16) for _ in range(3))
    with best_kernels(device, chosen.kernel):
        out = chosen.function(q, k, v)
    expected = exact_attention(q, k, v)
    assert (out.double() - expected).norm() < 0.02 * expected.norm()
    took = dict(chosen.seconds)
    now = took[f"sdpa {chosen.kernel}" if chosen.kernel else chosen.name]
    assert now < 1.16 * min(took.values())


@pytest.mark.parametrize("keys", [900, 257])
def test_sdpa_runs_a_fused_kernel(keys):
    """Nothing of the size of the attention matrix is taken."""
    q, k, v = (torch.randn(1, n, 8, 128).to("cuda", torch.bfloat16) for n in (16384, keys * 16, keys * 16))
    with best_kernels(q.device):
        sdpa(q, k, v)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        sdpa(q, k, v)
    assert torch.cuda.max_memory_allocated() - before < 8 * q.numel() * q.element_size()


@pytest.mark.parametrize("joint, parts", [(True, 1), (True, 4), (False, 4)])
def test_memory_of_a_step_is_as_estimated(joint, parts):
    import comfy.ops

    size, passes = gpu_size(blocks=2), 2 if joint else 1
    model = WanModel(size.config, comfy.ops.manual_cast, device="cuda", dtype=torch.bfloat16).eval()
    for p in model.parameters():
        p.zero_()
    x, t = torch.zeros(passes, 36, *size.latent, device="cuda"), torch.full((passes,), 500.0, device="cuda")
    text = torch.zeros(passes, 512, 4096, device="cuda", dtype=torch.bfloat16)
    clip = torch.zeros(passes, 257, 1280, device="cuda", dtype=torch.bfloat16)

    def run():
        with best_kernels(x.device):
            model(x, t, text, clip, pass_names=("cond", "uncond")[:passes], execute=block_executor(parts))

    run()  # workspaces of the libraries
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    real = torch.cuda.max_memory_allocated() - before
    assert 0.85 < step_estimate(size, MemoryPlan(joint, parts)) / real < 1.15
