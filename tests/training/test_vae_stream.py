"""The VAE's fast way of training: the numbers and the gradients of the plain way."""

import pytest
import torch
from wan21.training import data, train_vae, vae_stream
from wan21.wan.vae import WanVAE
from wan21.wan.vae.layers import conv_layer
from wan21.wan.vae.past import RecordedPast
from wan21.wan.vae.stream import stream


@pytest.fixture(autouse=True)
def recorded():
    with torch.inference_mode(False), torch.enable_grad():
        yield


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return WanVAE(dim=8)


def plainly(stages, x):
    (y,) = stream(stages, [x], 4 * x.shape[2], RecordedPast())
    return y


def result_and_gradients(vae, x, run):
    """Encoded and decoded; and the gradient of all weights, as one vector."""
    encoder, decoder = vae.encoder.stages(), vae.decoder.stages()
    encoder[-1].append(conv_layer(vae.conv1))
    decoder[0].insert(0, conv_layer(vae.conv2))
    y = run(decoder, run(encoder, x)[:, : vae.z_dim])
    vae.zero_grad()
    (y - x).square().mean().backward()
    return y.detach(), torch.cat([p.grad.flatten() for p in vae.parameters() if p.grad is not None])


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_in_float32_it_is_the_plain_way(vae, frames, monkeypatch):
    monkeypatch.setattr(vae_stream, "multiplies_in_bf16", lambda device: False)
    video = torch.rand(2, 3, frames, 32, 24) * 2 - 1
    y, gradients = result_and_gradients(vae, video, vae_stream.run)
    expected, expected_gradients = result_and_gradients(vae, video, plainly)
    assert relative(y, expected) < 1e-5
    assert relative(gradients, expected_gradients) < 1e-4


def test_in_bfloat16_it_points_the_same_way(vae, monkeypatch):
    monkeypatch.setattr(vae_stream, "multiplies_in_bf16", lambda device: True)
    video = data.clips(data.HELD_OUT + 1, 2, 5, 32, 32)[0]
    y, gradients = result_and_gradients(vae, video, vae_stream.run)
    expected, expected_gradients = result_and_gradients(vae, video, plainly)
    assert 0 < relative(y, expected) < 0.05
    assert torch.cosine_similarity(gradients, expected_gradients, dim=0) > 0.99


def test_without_a_compiler_norm_and_silu_are_the_same(monkeypatch):
    monkeypatch.setattr(vae_stream.shutil, "which", lambda name: None)

    def norm_silu(x, gain):
        return x * gain

    assert vae_stream.compiled(norm_silu) is norm_silu


def test_the_decoder_s_loss_reaches_every_weight(vae):
    z = torch.randn(1, 16, 2, 4, 4)
    train_vae.decode(vae, z).square().mean().backward()
    missing = [n for n, p in vae.named_parameters() if p.grad is None]
    assert all(n.startswith(("encoder.", "conv1.")) for n in missing)
