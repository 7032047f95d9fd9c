"""The VAE against diffusers' at toy size, and the laws it must keep."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from helpers import relative
from helpers_memory import peak_bytes
from helpers_vae import latents, pixels
from lib.random_weights import randomise
from wan21.wan.vae import WanVAE
from wan21.wan.vae.layers import AttentionBlock
from wan21.wan.vae.norm import RMSNorm, norm_silu

DIM = 16


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=DIM))


@pytest.fixture(scope="module")
def diffusers(vae):
    model = AutoencoderKLWan(base_dim=DIM).eval().requires_grad_(False)
    model.load_state_dict(convert_wan_vae_to_diffusers(dict(vae.state_dict())), strict=True)
    return model


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_encode_equals_diffusers(vae, diffusers, frames):
    x = pixels(frames)
    assert relative(vae.encode(x), diffusers.encode(x).latent_dist.mean) <= 1e-5


@pytest.mark.parametrize("frames", [1, 2, 5, 9])
def test_decode_equals_diffusers(vae, diffusers, frames):
    z = latents(frames)
    reference = diffusers.decode(z).sample  # clamped to [-1, 1]
    assert (reference.abs() < 1).float().mean() > 0.5 and reference.std() > 0.1  # else this proves nothing
    assert relative(vae.decode(z).clamp(-1, 1), reference) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_norm_of_a_vector_near_zero_is_finite(dtype):
    x = torch.zeros(1, 16, 1, 1, 3, dtype=dtype)
    x[:, 0] = torch.tensor([0.0, 6e-8, 1.0])
    assert RMSNorm(16, 3)(x).isfinite().all()


@pytest.mark.parametrize(
    ("h", "w", "m", "known"), [(5, 7, 4, 6), (70, 3, 4, 4), (9, 8, 3, 5), (8, 8, 2, 3), (6, 5, 1, 1)]
)
def test_cpu_convolution_equals_the_direct_sum(h, w, m, known, monkeypatch):
    from wan21.wan.vae import cpu

    monkeypatch.setattr(cpu, "STRIP_BYTES", 0)  # the smallest strips
    torch.manual_seed(m)
    conv = randomise(torch.nn.Conv3d(16, 24, 3, padding=(0, 1, 1)))
    norm = RMSNorm(16, 3)
    norm.gamma.data += 0.2 * torch.randn_like(norm.gamma)
    frames, base = torch.randn(2, 16, known, h, w), torch.randn(2, 24, m, h, w)
    normed = norm_silu(norm, frames)
    expected = conv.double()(torch.nn.functional.pad(normed, (0, 0, 0, 0, m + 2 - known, 0)).double())
    conv.float()
    fresh = frames[:, :, known - m :].contiguous(memory_format=torch.channels_last_3d)
    given = fresh.clone()
    before = normed[:, :, : known - m] if known > m else None
    y, kept = cpu.causal_conv3(conv, before.clone() if known > m else None, fresh, norm)
    assert relative(y, expected) <= 1e-6
    assert relative(kept, normed[:, :, -2:]) <= 1e-6
    assert torch.equal(fresh, given)
    again = before.clone() if known > m else None  # a full cache is overwritten
    added, _ = cpu.causal_conv3(conv, again, fresh, norm, add_to=base.clone())
    assert relative(added, expected + base) <= 1e-6
    plain, kept = cpu.causal_conv3(conv, before, normed[:, :, known - m :])
    assert relative(plain, expected) <= 1e-6
    assert torch.equal(kept, normed[:, :, -2:])


def test_cpu_upsampling_equals_the_direct_sum():
    from wan21.wan.vae import cpu

    conv = randomise(torch.nn.Conv2d(16, 8, 3, padding=1))
    x = torch.randn(3, 16, 5, 7)
    expected = conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"))
    assert relative(cpu.upsample_conv(conv, x), expected) <= 1e-6


def test_batch_is_independent(vae):
    z = latents(2, batch=3)
    assert relative(vae.decode(z)[1:2], vae.decode(z[1:2])) <= 2e-6


@pytest.mark.parametrize("chunk_frames", [1, 2, 3, 4, 7, 100])
def test_chunk_length_changes_nothing(vae, chunk_frames):
    x, z = pixels(17, 24, 40), latents(5, 3, 5)
    assert relative(vae.encode(x, chunk_frames=chunk_frames), vae.encode(x)) <= 5e-6
    assert relative(vae.decode(z, chunk_frames=chunk_frames), vae.decode(z)) <= 5e-6


def test_same_call_same_bytes(vae):
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    x, z = pixels(9), latents(3)
    assert torch.equal(vae.encode(x), vae.encode(x))
    first = vae.decode(z)
    vae.encode(x)
    assert torch.equal(first, vae.decode(z))
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    assert torch.equal(z, latents(3)) and torch.equal(x, pixels(9))  # inputs are left alone


def test_a_cancelled_call_leaves_nothing_behind(vae):
    class Cancelled(Exception):
        pass

    def cancel(done, total):
        raise Cancelled

    z = latents(3)
    expected = vae.decode(z)
    names = {id(module): set(vars(module)) for module in vae.modules()}
    with pytest.raises(Cancelled):
        vae.decode(z, progress=cancel)
    assert names == {id(module): set(vars(module)) for module in vae.modules()}
    assert torch.equal(vae.decode(z), expected)


def test_progress_counts_to_the_end(vae):
    calls = []
    vae.decode(latents(3), chunk_frames=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9) and calls == sorted(calls) and len(calls) > 3
    calls.clear()
    vae.encode(pixels(9), progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (9, 9) and calls == sorted(calls)
    calls.clear()
    vae.decode_tiled(latents(1), 3, 2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 4) for done in (1, 2, 3, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_decode_writes_into_the_buffer(vae, dtype):
    z = latents(3)
    buffer = torch.empty(vae.decode_output_shape(z.shape), dtype=dtype)
    assert vae.decode(z, output_buffer=buffer) is buffer
    assert torch.equal(buffer, vae.decode(z).to(dtype))


def test_other_floats(vae):
    z, x = latents(2), pixels(5)
    for dtype in (torch.bfloat16, torch.float16):
        low = WanVAE(dim=DIM, dtype=dtype).requires_grad_(False)
        low.load_state_dict(vae.state_dict())
        assert low.decode(z.to(dtype)).dtype == dtype
        assert relative(low.decode(z.to(dtype)), vae.decode(z)) < 0.05
        assert relative(low.encode(x.to(dtype)), vae.encode(x)) < 0.05


@pytest.mark.parametrize("plain", [True, False])
def test_convolutions_that_do_more_than_convolve_are_called(vae, monkeypatch, plain):
    from wan21.wan.vae import cpu

    monkeypatch.setattr(cpu, "MIN_VOXELS", 1)
    monkeypatch.setattr(WanVAE, "is_plain", lambda self, conv: plain)
    called = []
    convs = [vae.decoder.head[2], vae.decoder.upsamples[3].resample[1]]
    hooks = [conv.register_forward_hook(lambda *_: called.append(1)) for conv in convs]
    decoded = vae.decode(latents(2))
    for hook in hooks:
        hook.remove()
    assert bool(called) != plain
    monkeypatch.undo()
    assert relative(decoded, vae.decode(latents(2))) <= 2e-6


def test_gradients_reach_every_parameter(vae):
    model = WanVAE(dim=8)
    randomise(model).requires_grad_(True)
    with torch.enable_grad():
        model.decode(model.encode(pixels(5, 16, 16))).square().mean().backward()
        recorded = model.decode(latents(2)).detach()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # the log-variance half of conv1 is unused, so its weights see zeros there, and only there
        assert parameter.grad.abs().sum() > 0, name
    assert relative(recorded, model.decode(latents(2))) <= 2e-6


# Tiles


def test_one_tile_is_the_whole(vae):
    x, z = pixels(5), latents(2)
    assert torch.equal(vae.encode_tiled(x), vae.encode(x))
    assert relative(vae.decode_tiled(z), vae.decode(z)) <= 2e-6
    buffer = torch.full(vae.decode_output_shape(z.shape), float("nan"))
    assert vae.decode_tiled(z, output_buffer=buffer) is buffer
    assert relative(buffer, vae.decode(z)) <= 2e-6


@pytest.mark.parametrize(
    ("h", "w", "tile_y", "tile_x", "overlap"),
    [(5, 7, 4, 3, 1), (9, 4, 4, 32, 2), (13, 11, 5, 5, 4), (8, 8, 4, 4, 0)],
)
def test_tile_weights_add_up_to_one(h, w, tile_y, tile_x, overlap):
    from wan21.wan.vae.tiling import plan_tiles

    for scale in (1, 8):
        total = torch.zeros(h * scale, w * scale)
        for ys, xs, weight in plan_tiles(h, w, tile_y, tile_x, overlap, scale):
            assert (ys.stop - ys.start, xs.stop - xs.start) == (min(tile_y, h), min(tile_x, w))
            assert weight.min() > 0
            total[ys.start * scale : ys.stop * scale, xs.start * scale : xs.stop * scale] += weight
        torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_blend_without_a_seam():
    """Where the weights make each pixel depend on its own latent only, tiles and whole agree exactly."""
    local = randomise(WanVAE(dim=8))
    for name, parameter in local.named_parameters():
        if parameter.ndim >= 4 and parameter.shape[-1] == 3:
            centre = parameter[..., 1, 1].clone()
            parameter.zero_()
            parameter[..., 1, 1] = centre
        if "to_qkv" in name or "proj" in name:
            parameter.zero_()
    whole = local.decode(latents(2, 9, 10))
    assert relative(local.encode_tiled(whole, 48, 40, 16), local.encode(whole)) <= 1e-6


@pytest.mark.parametrize(("h", "w", "tile_x", "tile_y"), [(5, 7, 3, 2), (1, 30, 4, 4), (34, 3, 8, 16)])
def test_decoded_tiles_are_the_whole(vae, h, w, tile_x, tile_y):
    z = latents(2, h, w)
    assert relative(vae.decode_tiled(z, tile_x, tile_y), vae.decode(z)) <= 2e-6


# Memory


def test_memory_does_not_grow_with_the_frames(vae):
    """Six times the frames; a quarter is left for the moment at which Python drops a tensor."""
    few, many = latents(5, 2, 2), latents(29, 2, 2)
    peaks = []
    for z in (few, many):
        buffer = torch.empty(vae.decode_output_shape(z.shape))
        peaks.append(peak_bytes(vae.decode, z, output_buffer=buffer))
    assert peaks[1] <= peaks[0] * 1.25
    peaks = [peak_bytes(vae.encode, pixels(frames, 16, 16)) for frames in (17, 97)]
    assert peaks[1] <= peaks[0] * 1.25 + many.nbytes  # the result itself


# Errors


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda v: v.encode(torch.zeros(1, 3, 16, 16, 16)), ["16 frames", "4n", "13 or 17"]),
        (lambda v: v.encode(torch.zeros(1, 3, 5, 20, 16)), ["16 x 20", "multiples of 8", "16 x 16"]),
        (lambda v: v.encode(torch.zeros(1, 4, 5, 16, 16)), ["(1, 4, 5, 16, 16)", "[batch, 3", "RGB"]),
        (
            lambda v: v.encode(torch.zeros(1, 3, 5, 16, 16), chunk_frames=0),
            ["chunk_frames = 0", "at least 1"],
        ),
        (lambda v: v.decode(torch.zeros(1, 4, 2, 2, 2)), ["(1, 4, 2, 2, 2)", "16", "Wan2.1 latent"]),
        (lambda v: v.decode_tiled(torch.zeros(1, 16, 2)), ["(1, 16, 2)", "latent"]),
        (
            lambda v: v.decode(torch.zeros(1, 16, 2, 2, 2), output_buffer=torch.zeros(1, 3, 5, 16, 8)),
            ["(1, 3, 5, 16, 8)", "(1, 3, 5, 16, 16)", "decode_output_shape"],
        ),
        (lambda v: v.decode_tiled(torch.zeros(1, 16, 2, 2, 2), 8, 0), ["64 x 0 pixels", "at least 8", "256"]),
        (
            lambda v: v.encode_tiled(torch.zeros(1, 3, 5, 16, 72), 64, 64, 64),
            ["64 x 64 pixels", "overlap of 64", "smaller", "256"],
        ),
        (
            lambda v: v.encode_tiled(torch.zeros(1, 3, 5, 16, 16), tile_x=100),
            ["tile_x = 100", "multiple", "96"],
        ),
    ],
)
def test_errors_name_value_rule_and_fix(vae, call, words):
    with pytest.raises(ValueError) as caught:
        call(vae)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_attention_gets_what_fused_kernels_take(monkeypatch):
    """Channels last, also where the convolution before it gives another layout, as on CUDA."""
    block = randomise(AttentionBlock(8, torch.nn))
    x = torch.randn(1, 8, 2, 4, 6)
    past = SimpleNamespace(check=lambda: None)
    expected, seen = block(x, past), []

    def watch(q, k, v):
        seen.extend(t.stride(-1) for t in (q, k, v))
        return attention(q, k, v)

    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
    block.to_qkv.register_forward_hook(lambda _, __, out: out.contiguous())
    assert relative(block(x, past), expected) < 1e-6
    assert seen == 2 * [1, 1, 1]  # frame by frame
