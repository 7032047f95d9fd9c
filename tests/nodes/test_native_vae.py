"""The VAE beside the host's native one, at toy size."""

import pytest
import torch
from comfy import ops
from comfy.ldm.wan.vae import WanVAE as NativeVAE
from helpers import relative
from helpers_vae import latents, pixels
from lib.random_weights import randomise
from wan21.wan.vae import WanVAE

DIM = 16
MULTIPLIERS = {"dim_mult": [1, 2, 4, 4], "num_res_blocks": 2, "temperal_downsample": [False, True, True]}


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=DIM))


@pytest.fixture(scope="module")
def native(vae):
    model = NativeVAE(dim=DIM, z_dim=16, **MULTIPLIERS).eval().requires_grad_(False)
    model.load_state_dict(vae.state_dict(), strict=True)
    return model


def test_state_dict_is_the_releases(vae, native):
    ours = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    assert ours == {name: tensor.shape for name, tensor in native.state_dict().items()}


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_encode_equals_native(vae, native, frames):
    x = pixels(frames)
    assert relative(vae.encode(x), native.encode(x)) <= 1e-5


@pytest.mark.parametrize("frames, batch", [(1, 1), (2, 1), (5, 1), (9, 1), (2, 3)])
def test_decode_equals_native(vae, native, frames, batch):
    z = latents(frames, batch=batch)
    reference = native.decode(z)
    assert 0.1 < reference.std() < 10  # a comparison of zeros or of explosions proves nothing
    assert relative(vae.decode(z), reference) <= 1e-5


def test_host_operations(vae):
    z = latents(2)
    hosted = WanVAE(dim=DIM, operations=ops.disable_weight_init).requires_grad_(False)
    hosted.load_state_dict(vae.state_dict(), strict=True)
    assert torch.equal(hosted.decode(z), vae.decode(z))
