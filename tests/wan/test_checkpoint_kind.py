"""Files picked in the wrong loader, made by the real classes, are called by their names."""

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    FluxTransformer2DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from helpers_checkpoint import UMT5_SIZE, meta_state_dict, umt5_state_dict, with_prefix
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    T5Config,
    T5EncoderModel,
)
from wan21.wan import files as ck

DIT = {"ffn_dim": 30, "freq_dim": 16, "text_dim": 20, "num_layers": 2}


def diffusers_dit(**kwargs):
    return WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, **DIT, **kwargs)


def tiny(config):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return config(**size)


def keys_only(*keys):
    return {key: torch.empty(1, device="meta") for key in keys}


DIT_KEYS = ("head.modulation", "patch_embedding.weight", "text_embedding.0.weight")
SD_VAE = {"block_out_channels": (32,), "norm_num_groups": 4}
WRONG_FILES = {
    "wan21_dit": lambda: meta_state_dict(lambda: diffusers_dit(in_channels=16)),
    "wan21_vae": lambda: meta_state_dict(lambda: AutoencoderKLWan(base_dim=8)),
    "umt5": umt5_state_dict,
    "vace": lambda: meta_state_dict(
        lambda: WanVACETransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, vace_layers=[0], vace_in_channels=96, **DIT
        )
    ),
    "wan22_dit": lambda: meta_state_dict(lambda: diffusers_dit(in_channels=48, out_channels=48)),
    "fun_control": lambda: meta_state_dict(lambda: diffusers_dit(in_channels=48, image_dim=8)),
    "fun_control_22": lambda: meta_state_dict(lambda: diffusers_dit(in_channels=52)),
    "wan22_vae (diffusers)": lambda: meta_state_dict(
        lambda: AutoencoderKLWan(
            base_dim=8, z_dim=48, is_residual=True, in_channels=12, out_channels=12, patch_size=2
        )
    ),
    "kl_vae": lambda: meta_state_dict(lambda: AutoencoderKL(**SD_VAE)),
    "kl_vae (original)": lambda: keys_only("decoder.up.0.block.0.norm1.weight", "quant_conv.weight"),
    "vae": lambda: meta_state_dict(
        lambda: AutoencoderKLHunyuanVideo(block_out_channels=(8, 8, 8, 8), norm_num_groups=4)
    ),
    "t5": lambda: meta_state_dict(
        lambda: T5EncoderModel(T5Config(**UMT5_SIZE, feed_forward_proj="gated-gelu"))
    ),
    "clip": lambda: meta_state_dict(lambda: CLIPTextModel(tiny(CLIPTextConfig))),
    "clip_vision": lambda: with_prefix(
        "vision_model.", meta_state_dict(lambda: CLIPVisionModel(tiny(CLIPVisionConfig)))
    ),
    "llm": lambda: with_prefix("model.", meta_state_dict(lambda: LlamaModel(tiny(LlamaConfig)))),
    "mmdit": lambda: meta_state_dict(
        lambda: FluxTransformer2DModel(num_layers=1, num_single_layers=0, num_attention_heads=1)
    ),
    "sd": lambda: keys_only(
        "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
        "first_stage_model.decoder.up.0.block.0.norm1.weight",
    ),
    "s2v": lambda: keys_only("casual_audio_encoder.encoder.conv.weight", "head.modulation"),
    "animate": lambda: keys_only("face_adapter.fuser_blocks.0.k_norm.weight", "head.modulation"),
    "humo": lambda: keys_only("audio_proj.audio_proj_glob_1.layer.bias", *DIT_KEYS),
    "talk": lambda: keys_only("blocks.0.audio_cross_attn.kv_linear.weight"),
    "talk (MultiTalk)": lambda: keys_only("multitalk_audio_proj.proj1.weight"),
    "talk (alone)": lambda: keys_only("audio_proj.proj1.weight", "blocks.0.norm_x.weight"),
    "longcat_avatar": lambda: keys_only(
        "blocks.0.audio_modulation.1.weight", "multitalk_audio_proj.proj1.weight"
    ),
    "longcat_avatar (release)": lambda: keys_only(
        "blocks.0.audio_adaLN_modulation.1.weight",
        "blocks.0.audio_cross_attn.kv_linear.weight",
        "audio_proj.proj1.weight",
        "blocks.0.cross_attn.q_linear.weight",
    ),
    "longcat (with Wan's names)": lambda: keys_only(
        "head.modulation.1.weight", "blocks.0.self_attn.q.weight"
    ),
    "longcat": lambda: keys_only("blocks.0.cross_attn.q_linear.weight", "blocks.0.attn.qkv.weight"),
    "ovi": lambda: keys_only("video_model.head.modulation", "audio_model.blocks.0.self_attn.q.weight"),
    "fantasy_talking": lambda: keys_only("proj_model.proj.weight"),
    "fantasy_portrait": lambda: keys_only(
        "ip_adapter.blocks.0.cross_attn.ip_adapter_single_stream_k_proj.weight"
    ),
    "fantasy_portrait (Flash)": lambda: keys_only("blocks.0.cross_attn.emo_k_proj.weight"),
    "lynx": lambda: keys_only("blocks.0.self_attn.ref_adapter.to_k_ref.weight"),
    "lynx (lite)": lambda: keys_only("blocks.0.cross_attn.ip_adapter.to_v_ip.weight"),
    "stand_in": lambda: keys_only("blocks.0.self_attn.q_loras.down.weight"),
    "unianimate": lambda: keys_only("dwpose_embedding.0.weight"),
    "mtv_crafter": lambda: keys_only("blocks.0.motion_attn.k.weight"),
    "recammaster": lambda: keys_only("blocks.0.cam_encoder.weight", "blocks.0.projector.bias"),
    "steady_dancer": lambda: keys_only("condition_embedding_spatial.0.weight"),
    "fun_camera": lambda: keys_only("control_adapter.conv.weight", "img_emb.proj.0.bias", *DIT_KEYS),
    "fun_camera_22": lambda: keys_only("control_adapter.conv.weight", *DIT_KEYS),
    "scail": lambda: keys_only("patch_embedding_pose.weight", *DIT_KEYS),
    "scail2": lambda: keys_only("patch_embedding_mask.weight", "patch_embedding_pose.weight", *DIT_KEYS),
    "dancer": lambda: keys_only("patch_embedding_global.weight", *DIT_KEYS),
    "fun_control (reference)": lambda: keys_only("ref_conv.weight", "img_emb.proj.0.bias", *DIT_KEYS),
    "fun_control_22 (reference)": lambda: keys_only("ref_conv.weight", *DIT_KEYS),
    "remover": lambda: keys_only("head.modulation", "patch_embedding.weight", "blocks.0.ffn.0.weight"),
    "lora": lambda: keys_only("diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
    "lora (kohya)": lambda: keys_only("lora_unet_blocks_0_self_attn_q.lora_down.weight"),
    "lora (difference)": lambda: keys_only("diffusion_model.patch_embedding.diff"),
}


@pytest.fixture(scope="module")
def wrong_files():
    return {case: build() for case, build in WRONG_FILES.items()}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_kind_is_detected_under_any_prefix(case, wrong_files):
    for prefix in ("", "some.prefix."):
        assert ck.detect_kind(with_prefix(prefix, wrong_files[case])).name == case.partition(" ")[0]


@pytest.mark.parametrize("case", WRONG_FILES)
@pytest.mark.parametrize("rename", [ck.to_wan_dit_keys, ck.to_wan_vae_keys, ck.to_umt5_keys])
def test_each_loader_names_the_wrong_file(rename, case, wrong_files):
    weights = wrong_files[case]
    own = {ck.to_wan_dit_keys: "wan21_dit", ck.to_wan_vae_keys: "wan21_vae", ck.to_umt5_keys: "umt5"}[rename]
    if case == own:
        assert len(rename(weights)) > 0
        return
    with pytest.raises(ValueError) as error:
        rename(weights)
    kind = ck.detect_kind(weights)
    assert str(error.value).endswith(f"It is {kind.what}; {kind.fix}.")


def test_the_words_for_common_mistakes(wrong_files):
    def message(rename, case):
        with pytest.raises(ValueError) as error:
            rename(wrong_files[case])
        return str(error.value)

    assert "a Wan2.1 diffusion model; load it as a diffusion model" in message(
        ck.to_wan_vae_keys, "wan21_dit"
    )
    assert "Wan2.2 VAE (48 latent channels)" in message(ck.to_wan_vae_keys, "wan22_vae (diffusers)")
    assert "AutoencoderKL of SD, SDXL or Flux" in message(ck.to_wan_vae_keys, "kl_vae")
    assert "VACE" in message(ck.to_wan_dit_keys, "vace")
    assert "It is a LoRA; load the base model, and then the LoRA" in message(ck.to_wan_dit_keys, "lora")
    assert "first block only" in message(ck.to_umt5_keys, "t5")
    assert "CLIP text encoder" in message(ck.to_umt5_keys, "clip")
    assert "LLaMA" in message(ck.to_umt5_keys, "llm")


def test_an_unknown_file_is_described_by_its_keys():
    assert ck.detect_kind(keys_only("layer1.0.conv1.weight")) is None
    with pytest.raises(
        ValueError, match=r"nor anything known here. Its first keys: layer1\.0\.conv1\.weight"
    ):
        ck.to_wan_vae_keys(keys_only("layer1.0.conv1.weight"))
    with pytest.raises(ValueError, match="Its first keys: none"):
        ck.to_wan_dit_keys({})
