"""DiT and VAE layouts against the real classes that write and load them, at toy size."""

import comfy.ops
import pytest
import torch
from comfy.ldm.wan.model import WanModel as NativeModel
from comfy.ldm.wan.vae import WanVAE as NativeVAE
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from helpers import relative
from helpers_checkpoint import meta_state_dict, umt5_state_dict, with_prefix
from lib.random_weights import randomise
from wan21.wan import files as ck

DIT = {"ffn_dim": 30, "freq_dim": 16, "text_dim": 20, "num_layers": 2}
DIT_CASES = {
    "t2v": ({"in_channels": 16}, {"model_type": "t2v", "in_dim": 16}),
    "i2v": (
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 24},
        {"model_type": "i2v", "in_dim": 36},
    ),
    "flf2v": (
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 24, "pos_embed_seq_len": 514},
        {"model_type": "i2v", "in_dim": 36, "flf_pos_embed_token_number": 514},
    ),
    "i2v without CLIP": ({"in_channels": 36}, {"model_type": "t2v", "in_dim": 36}),
}
VAE_CONFIG = {"num_res_blocks": 2, "attn_scales": [], "temperal_downsample": [False, True, True]}


def diffusers_dit(**kwargs):
    return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **DIT, **kwargs)


def native_dit(**kwargs):
    return NativeModel(dim=24, num_heads=2, **DIT, operations=comfy.ops.disable_weight_init, **kwargs)


def shapes(state_dict):
    return {key: tuple(tensor.shape) for key, tensor in state_dict.items()}


# --- DiT keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.diffusion_model."])
@pytest.mark.parametrize("case", DIT_CASES)
def test_diffusers_dit_gets_native_keys(case, prefix):
    theirs, ours = DIT_CASES[case]
    published = randomise(diffusers_dit(**theirs)).state_dict()
    native = native_dit(**ours)

    renamed = ck.to_wan_dit_keys(with_prefix(prefix, published))

    assert shapes(renamed) == shapes(native.state_dict())
    native.load_state_dict(renamed, strict=True)
    # The same tensors: same memory, same values, each used once.
    assert sorted(t.data_ptr() for t in renamed.values()) == sorted(t.data_ptr() for t in published.values())
    assert all(torch.equal(renamed[ck.wan_dit_key(key)], tensor) for key, tensor in published.items())


def test_dit_forward_is_the_same_after_renaming():
    theirs, ours = DIT_CASES["flf2v"]
    published, native = randomise(diffusers_dit(**theirs)), native_dit(**ours).eval()
    native.load_state_dict(ck.to_wan_dit_keys(published.state_dict()))
    g = torch.Generator().manual_seed(1)
    x, t = torch.randn(1, 36, 2, 6, 4, generator=g), torch.tensor([500.0])
    text, images = torch.randn(1, 512, 20, generator=g), torch.randn(2, 257, 1280, generator=g)
    with torch.no_grad():
        expected = published(x, t, text, images).sample
        got = native(x, t, text, clip_fea=images.reshape(1, 514, 1280))
    assert expected.std() > 0.01
    assert relative(got, expected) < 1e-5


# The host's loader reads a DiT below "model.model." and "net." too, and some trainers write the others.
@pytest.mark.parametrize(
    "prefix",
    ["", "model.diffusion_model.", "diffusion_model.", "model.", "transformer.", "model.model.", "net.",
     "module.", "model._orig_mod.", "generator.model."],
)  # fmt: skip
def test_original_dit_keys_are_only_stripped(prefix):
    original = meta_state_dict(lambda: native_dit(**DIT_CASES["flf2v"][1]))
    stripped = ck.to_wan_dit_keys(with_prefix(prefix, original))
    assert list(stripped) == list(original)
    assert all(stripped[key] is original[key] for key in original)


def test_quantization_keys_pass_prefix_stripping():
    bookkeeping = {
        name: torch.ones(1)
        for name in (
            "scaled_fp8",
            "blocks.0.self_attn.q.scale_weight",
            "blocks.0.self_attn.q.scale_input",
            "blocks.0.ffn.0.weight_scale",
            "blocks.0.ffn.0.input_scale",
            "blocks.0.ffn.0.comfy_quant",
        )
    }
    original = meta_state_dict(lambda: native_dit(**DIT_CASES["t2v"][1]))
    stripped = ck.to_wan_dit_keys(with_prefix("model.diffusion_model.", original | bookkeeping))
    assert all(stripped[key] is bookkeeping[key] for key in bookkeeping)
    assert all(ck.is_quantization_key(key) for key in bookkeeping)
    assert not any(ck.is_quantization_key(key) for key in original)
    ck.check_keys(shapes(original), stripped, "quantised.safetensors")


def test_whole_pipeline_checkpoint_yields_each_part():
    text = umt5_state_dict()
    del text["encoder.embed_tokens.weight"]
    parts = {
        "model.diffusion_model.": meta_state_dict(lambda: native_dit(**DIT_CASES["i2v"][1])),
        "vae.": meta_state_dict(lambda: NativeVAE(dim=8, z_dim=16, **VAE_CONFIG)),
        "text_encoders.umt5xxl.transformer.": text,
    }
    everything = {k: v for prefix, part in parts.items() for k, v in with_prefix(prefix, part).items()}
    everything["text_encoders.spiece_model"] = torch.zeros(3, dtype=torch.uint8)
    everything["text_encoders.umt5xxl.logit_scale"] = torch.ones(())
    dit, vae, text = parts.values()
    assert ck.to_wan_dit_keys(everything) == dit
    assert ck.to_wan_vae_keys(everything) == vae
    assert ck.to_umt5_keys(everything) == text | {"spiece_model": everything["text_encoders.spiece_model"]}


# --- VAE keys -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
def test_diffusers_vae_gets_native_keys(prefix):
    published = AutoencoderKLWan(base_dim=8).state_dict()
    native = meta_state_dict(lambda: NativeVAE(dim=8, z_dim=16, **VAE_CONFIG))
    renamed = ck.to_wan_vae_keys(with_prefix(prefix, published))
    assert shapes(renamed) == shapes(native)
    assert sorted(t.data_ptr() for t in renamed.values()) == sorted(t.data_ptr() for t in published.values())


def test_vae_encodes_and_decodes_the_same_after_renaming():
    published, native = randomise(AutoencoderKLWan(base_dim=4)), NativeVAE(dim=4, z_dim=16, **VAE_CONFIG)
    native.eval().load_state_dict(ck.to_wan_vae_keys(published.state_dict()), strict=True)
    g = torch.Generator().manual_seed(2)
    pixels = torch.rand(1, 3, 5, 8, 8, generator=g) * 2 - 1
    latent = torch.randn(1, 16, 2, 1, 1, generator=g)
    with torch.no_grad():
        assert relative(native.encode(pixels), published.encode(pixels).latent_dist.mode()) < 1e-5
        # diffusers clamps its decoded pixels to [-1, 1]
        decoded = published.decode(latent).sample
        assert (decoded.abs() < 1).float().mean() > 0.5
        assert relative(native.decode(latent).clamp(-1, 1), decoded) < 1e-5


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "model.", "module.", "vae.model."])
def test_original_vae_keys_are_only_stripped(prefix):
    original = meta_state_dict(lambda: NativeVAE(dim=8, z_dim=16, **VAE_CONFIG))
    assert ck.to_wan_vae_keys(with_prefix(prefix, original)) == original


# --- what some files carry besides --------------------------------------------------------------------


def test_a_key_that_names_the_variant_is_no_weight():
    """In files made for WanVideoWrapper, such as Wan2_1-FLF2V-14B-720P_fp8_e4m3fn.safetensors."""
    weights = native_dit(**DIT_CASES["i2v"][1]).state_dict()
    marked = weights | {"model_type.Wan2_1-FLF2V-14B-720P": torch.zeros(1)}
    assert ck.to_wan_dit_keys(marked).keys() == weights.keys()
    assert ck.to_wan_dit_keys(with_prefix("model.diffusion_model.", marked)).keys() == weights.keys()
