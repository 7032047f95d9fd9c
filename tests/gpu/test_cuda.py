"""What only a CUDA device can show: 16-bit parity, and memory that does not grow with the frames."""

import pytest
import torch
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.vae import WanVAE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


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
