"""The VAE's fast way of training: the numbers and the gradients of the plain way."""

import pytest
import torch
from wan21.training import data, train_vae, vae_stream
from wan21.wan.vae import WanVAE
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
    y = run(vae.decode_stages(), run(vae.encode_stages(), x)[:, : vae.z_dim])
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


def test_without_a_compiler_it_is_the_same_and_says_so(vae, monkeypatch, capsys):
    def missing(_):
        raise RuntimeError("no C++ compiler")

    video = torch.rand(1, 3, 5, 32, 24) * 2 - 1
    expected, expected_gradients = result_and_gradients(vae, video, vae_stream.run)
    monkeypatch.setattr(torch, "compile", lambda function: missing)
    vae_stream.compiles.cache_clear()
    y, gradients = result_and_gradients(vae, video, vae_stream.run)
    vae_stream.compiles.cache_clear()
    assert capsys.readouterr().out.count("not compiled") == 1
    assert relative(y, expected) < 0.01
    assert torch.cosine_similarity(gradients, expected_gradients, dim=0) > 0.999


def test_the_decoder_s_loss_reaches_every_weight(vae):
    z = torch.randn(1, 16, 2, 4, 4)
    train_vae.decode(vae, z).square().mean().backward()
    missing = [n for n, p in vae.named_parameters() if p.grad is None]
    assert all(n.startswith(("encoder.", "conv1.")) for n in missing)
