"""Whole Wan models with another model's weights beside run as the host runs them, and that is said."""

import json

import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_nodes import clip_vision, host_euler
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.wan.sample import SampleJob

METADATA = {"config": json.dumps({"transformer": {"text_dim": 128}})}
SIGMAS = SampleJob(3, 4.0, 3.0, "euler").sigmas
# Words of the name, by keys as public code has them.
ADDITIONS = {
    "UniAnimate": ["dwpose_embedding.0.weight", "randomref_embedding_pose.0.weight"],
    "SteadyDancer": [
        "condition_embedding_spatial.0.weight",
        "condition_embedding_align.weight",
        "patch_embedding_fuse.weight",
        "patch_embedding_ref_c.weight",
    ],
    "Stand-In": ["blocks.0.self_attn.q_loras.down.weight"],
    "MultiTalk": [
        "blocks.0.audio_cross_attn.kv_linear.weight",
        "audio_proj.proj1.weight",
        "blocks.0.norm_x.weight",
    ],
    "FlashPortrait": ["blocks.0.cross_attn.emo_k_proj.weight"],
    "FantasyTalking": ["proj_model.proj.weight"],
    "Lynx": ["blocks.0.cross_attn.ip_adapter.to_v_ip.weight"],
    "ReCamMaster": ["blocks.0.cam_encoder.weight", "blocks.0.projector.bias"],
    "MTV-Crafter": ["blocks.0.motion_attn.k.weight", "blocks.0.norm4.weight"],
    "LongCat": ["blocks.0.audio_modulation.1.weight"],
    "a LoRA": ["blocks.0.self_attn.q.lora_A.weight", "blocks.0.self_attn.q.lora_B.weight"],
}


@pytest.mark.parametrize("base", ["t2v", "i2v"])
@pytest.mark.parametrize("name", ADDITIONS)
def test_the_plain_model_runs_as_natively_and_it_is_said(
    name, base, files, tmp_path, prompts, sample, caplog
):
    path = tmp_path / "more.safetensors"
    extra = {key: torch.ones(4, 4) for key in ADDITIONS[name]}
    save_file(load_file(files[base]) | extra, path, METADATA)
    with caplog.at_level("INFO"):
        model = host.load_model(path)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    seen = [[[text, values | {"clip_vision_output": clip_vision()}] for text, values in c] for c in prompts]
    ours, report = sample(model, *seen, latent, solver="euler")
    native = comfy.sd.load_diffusion_model(str(path))
    assert relative(ours["samples"], host_euler(native, *seen, latent, SIGMAS, 4.0, 3)) < 2e-5
    (note,) = host.notes_on_file(model)
    assert name in note and "what they add is not used" in note
    assert note in caplog.text and note in report


@pytest.mark.parametrize("channels", [48, 52, 64])
def test_more_input_channels_are_refused_whatever_lies_beside(channels, files, tmp_path):
    state = load_file(files["i2v"]) | {"dwpose_embedding.0.weight": torch.ones(4, 4)}
    weight = state["patch_embedding.weight"]
    state["patch_embedding.weight"] = torch.zeros(weight.shape[0], channels, *weight.shape[2:])
    save_file(state, tmp_path / "wide.safetensors", METADATA)
    with pytest.raises(ValueError, match="Fun-Control"):
        host.load_model(tmp_path / "wide.safetensors")
