"""Our DiT beside the host's native one, in float32 with the same random weights."""

import comfy.ops
import pytest
import torch
from comfy.ldm.wan.model import WanModel as NativeModel
from helpers import relative
from helpers_dit import I2V, KINDS, inputs, ours
from wan21.wan.config import SIZES, detect_config
from wan21.wan.dit import WanModel


def native(config, operations=comfy.ops.disable_weight_init):
    return NativeModel(
        model_type="t2v" if config.image_dim is None else "i2v",
        in_dim=config.in_dim, dim=config.dim, ffn_dim=config.ffn_dim, text_dim=config.text_dim,
        num_heads=config.num_heads, num_layers=config.num_layers,
        flf_pos_embed_token_number=config.image_tokens, operations=operations,
    ).eval()  # fmt: skip


def native_with(state, config):
    model = native(config)
    model.load_state_dict(state, strict=True)
    return model


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("size", [(1, 2, 2), (3, 6, 10), (5, 14, 4)])
def test_equals_native(config, size):
    model = ours(config)
    x, t, text, clip = inputs(config, *size, batch=2)
    expected = native_with(model.state_dict(), config)(x, t, text, clip_fea=clip)
    assert relative(model(x, t, text, clip), expected) < 1e-5


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes_have_the_native_keys_and_shapes(name):
    with torch.device("meta"):
        model = WanModel(SIZES[name], torch.nn)
        expected = native(SIZES[name], torch.nn)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert shapes == {k: tuple(v.shape) for k, v in expected.state_dict().items()}
    assert detect_config(model.state_dict()) == SIZES[name]


def test_without_clip_features_the_image_branch_is_left_out():
    model = ours(I2V)
    x, t, text, _ = inputs(I2V)
    state = model.state_dict()
    for key in state:
        if "v_img" in key:
            state[key] = torch.zeros_like(state[key])
    silent = native_with(state, I2V)(x, t, text, clip_fea=torch.zeros(1, 257, 1280))
    assert relative(model(x, t, text), silent) < 1e-5
