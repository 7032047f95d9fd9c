"""Loader nodes: the layouts people have, and errors that name node and file."""

import json
import re
import shutil

import folder_paths
import gguf
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from helpers import relative
from helpers_hostile import Gguf
from helpers_nodes import host_euler
from lib.gguf_files import write_umt5
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.nodes.load import (
    Wan21ModelLoader,
    Wan21TextEncoderLoader,
    Wan21VAELoader,
    file_names,
    gguf_names,
    model_names,
)
from wan21.server.traits import read_traits


@pytest.fixture
def folders(tmp_path):
    """Empty model folders, known to the host. Returns kind -> path."""
    kept = {k: (list(v[0]), set(v[1])) for k, v in folder_paths.folder_names_and_paths.items()}
    paths = {}
    for kind in ("diffusion_models", "vae", "text_encoders"):
        paths[kind] = tmp_path / kind
        paths[kind].mkdir()
        folder_paths.add_model_folder_path(kind, str(paths[kind]), is_default=True)
    folder_paths.filename_list_cache.clear()
    yield paths
    folder_paths.folder_names_and_paths.clear()
    folder_paths.folder_names_and_paths.update(kept)
    folder_paths.filename_list_cache.clear()


def same_weights(a, b):
    for model in (a, b):
        model.detach()  # the host leaves the weights patched after a run, here of another test
    states = [m.model.diffusion_model.state_dict() for m in (a, b)]
    assert states[0].keys() == states[1].keys()
    return all(torch.equal(states[0][k], states[1][k]) for k in states[0])


METADATA = {"config": json.dumps({"transformer": {"text_dim": 128}})}


def test_prefixed_checkpoint(files, folders, models):
    state = {f"model.diffusion_model.{k}": v for k, v in load_file(files["i2v"]).items()}
    save_file(state, folders["diffusion_models"] / "prefixed.safetensors")
    assert same_weights(Wan21ModelLoader.execute("prefixed.safetensors", "default").result[0], models["i2v"])


@pytest.mark.parametrize("pick", [1, 2])
def test_sharded_checkpoint(files, folders, models, pick):
    state = list(load_file(files["t2v"]).items())
    folder = folders["diffusion_models"] / "Wan2.1-T2V"
    folder.mkdir()
    index = {}
    for i, part in enumerate((state[:20], state[20:]), 1):
        name = f"diffusion_pytorch_model-{i:05d}-of-00002.safetensors"
        save_file(dict(part), folder / name)
        index |= {key: name for key, _ in part}
    path = folder / "diffusion_pytorch_model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": index}))
    listed = [n for n in file_names("diffusion_models") if "diffusion_pytorch" in n]
    assert [n.replace("\\", "/") for n in listed] == [
        "Wan2.1-T2V/diffusion_pytorch_model-00001-of-00002.safetensors"
    ]
    name = f"Wan2.1-T2V/diffusion_pytorch_model-{pick:05d}-of-00002.safetensors"
    assert same_weights(Wan21ModelLoader.execute(name, "default").result[0], models["t2v"])


def test_diffusers_layout(folders, prompts, sample):
    peer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=128, text_dim=128, ffn_dim=512, num_layers=2
    )
    save_file(peer.state_dict(), folders["diffusion_models"] / "diffusers.safetensors")
    model = Wan21ModelLoader.execute("diffusers.safetensors", "fp32").result[0]
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 512, 128)
    t = torch.tensor([500.0])
    expected = peer.eval()(x, t, text, return_dict=False)[0]
    ours = model.model.diffusion_model(x, t, text)
    assert relative(ours, expected) < 1e-5


def test_diffusers_vae_layout(folders):
    peer = AutoencoderKLWan(base_dim=16).eval()
    save_file(peer.state_dict(), folders["vae"] / "diffusers.safetensors")
    vae = Wan21VAELoader.execute("diffusers.safetensors", "fp32").result[0]
    z = torch.randn(1, 16, 2, 2, 3)
    expected = (peer.decode(z).sample.movedim(1, -1) + 1).div(2).clamp(0, 1)
    assert torch.allclose(vae.decode(z), expected, atol=1e-4)


def test_text_encoder_with_the_tokenizer_beside_it(files, folders, prompts):
    state = load_file(files["umt5"])
    (folders["text_encoders"] / "spiece.model").write_bytes(state.pop("spiece_model").numpy().tobytes())
    save_file(state, folders["text_encoders"] / "umt5.safetensors")
    clip = Wan21TextEncoderLoader.execute("umt5.safetensors", "cpu").result[0]
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat walks through the grass"))
    assert torch.equal(cond[0][0], prompts[0][0][0])


def test_text_encoder_without_tokenizer_is_named(files, folders):
    state = load_file(files["umt5"])
    state.pop("spiece_model")
    save_file(state, folders["text_encoders"] / "umt5.safetensors")
    with pytest.raises(ValueError, match=r"^Wan21TextEncoderLoader: umt5.safetensors: .*spiece\.model"):
        Wan21TextEncoderLoader.execute("umt5.safetensors", "default")


def as_fp8(state, scaled):
    """Matrices stored as float8_e4m3fn, plain or with one scale each (the layout of published files)."""
    out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)} if scaled else {}
    for key, weight in state.items():
        if "block" in key and key.endswith(".weight") and weight.ndim == 2 and "bias" not in key:
            scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
            out[key] = (weight / scale).to(torch.float8_e4m3fn)
            if scaled:
                out[key.replace(".weight", ".scale_weight")] = scale
        else:
            out[key] = weight.half() if weight.ndim == 2 else weight
    return out


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
def test_stored_fp8(files, folders, models, prompts, sample, scaled):
    from comfy.sd import load_diffusion_model

    path = folders["diffusion_models"] / "fp8.safetensors"
    save_file(as_fp8(load_file(files["t2v"]), scaled), path, metadata=METADATA)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    model = Wan21ModelLoader.execute("fp8.safetensors", "default").result[0]
    ours = sample(model, *prompts, latent)[0]["samples"]
    exact = sample(models["t2v"], *prompts, latent)[0]["samples"]
    assert 0 < relative(ours, exact) < 0.2
    native = load_diffusion_model(str(path))
    both = [host_euler(m, *prompts, latent, [1.0, 0.5, 0.0], 1.0, 0) for m in (model, native)]
    assert relative(*both) < (1e-5 if scaled else 0.05)


def test_scaled_e5m2_stays_e5m2(files, folders, models, prompts, sample):
    """Kijai's ..._fp8_e5m2_scaled files; in e4m3 most of these numbers are too large."""
    state = as_fp8(load_file(files["t2v"]), True)
    for key in [key for key in state if key.endswith(".scale_weight")]:
        weight = key.replace(".scale_weight", ".weight")
        scaled = state[weight].float() * (57344 / 448)
        state |= {weight: scaled.to(torch.float8_e5m2), key: state[key] / (57344 / 448)}
    save_file(state, folders["diffusion_models"] / "e5m2.safetensors", metadata=METADATA)
    model = Wan21ModelLoader.execute("e5m2.safetensors", "default").result[0]
    assert model.model.diffusion_model.blocks[0].ffn[0].weight._qdata.dtype == torch.float8_e5m2
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    ours, exact = (sample(m, *prompts, latent)[0]["samples"] for m in (model, models["t2v"]))
    assert 0 < relative(ours, exact) < 0.3


@pytest.mark.parametrize(
    ("node", "folder", "kind", "inputs"),
    [
        (Wan21ModelLoader, "diffusion_models", "t2v", ["default"]),
        (Wan21TextEncoderLoader, "text_encoders", "umt5", ["default"]),
    ],
)
def test_scales_that_nothing_would_apply_are_named(files, folders, node, folder, kind, inputs):
    """LightX2V's own fp8 files: a scale for each row, and no word on the format."""
    state = as_fp8(load_file(files[kind]), True)
    del state["scaled_fp8"]
    state = {key.replace(".scale_weight", ".weight_scale"): value for key, value in state.items()}
    save_file(state, folders[folder] / "loose.safetensors", metadata=METADATA)
    with pytest.raises(ValueError, match="nothing says in which format"):
        node.execute("loose.safetensors", *inputs)


@pytest.mark.parametrize("scaled", [False, True])
def test_scaled_fp8_inside_a_whole_pipeline(files, folders, models, prompts, sample, scaled):
    """Each part has a marker of its own; the scales of the others are not the business of a loader."""
    dit = as_fp8(load_file(files["t2v"]), True)
    text = as_fp8(load_file(files["umt5"]), True) if scaled else load_file(files["umt5"])
    parts = {"model.diffusion_model.": dit, "text_encoders.umt5xxl.transformer.": text}
    whole = {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}
    for folder in ("diffusion_models", "text_encoders"):
        save_file(whole, folders[folder] / "whole.safetensors", metadata=METADATA)
    clip = Wan21TextEncoderLoader.execute("whole.safetensors", "default").result[0]
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat walks through the grass"))
    difference = relative(cond[0][0], prompts[0][0][0])
    assert 0 < difference < 0.2 if scaled else difference < 1e-5
    model = Wan21ModelLoader.execute("whole.safetensors", "default").result[0]
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    ours, exact = (sample(m, *prompts, latent)[0]["samples"] for m in (model, models["t2v"]))
    assert 0 < relative(ours, exact) < 0.2


def test_one_shard_of_a_text_encoder_is_named(files, folders):
    state = load_file(files["umt5"])
    del state["encoder.final_layer_norm.weight"]
    save_file(state, folders["text_encoders"] / "shard.safetensors")
    with pytest.raises(ValueError, match=r"lacks encoder\.final_layer_norm\.weight"):
        Wan21TextEncoderLoader.execute("shard.safetensors", "default")


def test_quantised_weights_stay_as_they_are_stored(files, folders):
    save_file(as_fp8(load_file(files["t2v"]), True), folders["diffusion_models"] / "q.safetensors", METADATA)
    with pytest.raises(
        ValueError, match=r"weights of this file are quantised; .* Set weight_dtype to default"
    ):
        Wan21ModelLoader.execute("q.safetensors", "bf16")


def test_text_encoder_stored_as_scaled_fp8(files, folders, prompts):
    """The layout of umt5_xxl_fp8_e4m3fn_scaled.safetensors, which most people have."""
    path = folders["text_encoders"] / "fp8.safetensors"
    save_file(as_fp8(load_file(files["umt5"]), scaled=True), path)
    clip = Wan21TextEncoderLoader.execute("fp8.safetensors", "default").result[0]
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat walks through the grass"))
    assert 0 < relative(cond[0][0], prompts[0][0][0]) < 0.2


def broken(path, how, files):
    if how == "truncated":
        path.write_bytes(files["t2v"].read_bytes()[:-1000])
    elif how == "html":
        path.write_text("<!DOCTYPE html><html>Sign in</html>")
    elif how == "missing keys":
        state = load_file(files["t2v"])
        del state["blocks.1.ffn.0.bias"]
        save_file(state, path, metadata=METADATA)
    elif how == "wrong shape":
        state = load_file(files["t2v"])
        state["blocks.1.ffn.0.bias"] = torch.zeros(3)
        save_file(state, path, metadata=METADATA)
    elif how == "flat patches":
        state = load_file(files["t2v"])
        state["patch_embedding.weight"] = state["patch_embedding.weight"].flatten(1)
        save_file(state, path, metadata=METADATA)
    elif how == "t2v with an image branch":
        image = {k: v for k, v in load_file(files["i2v"]).items() if "img" in k}
        save_file(load_file(files["t2v"]) | image, path, metadata=METADATA)
    else:
        shutil.copy(files[how], path)


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated", "(?i:truncated|incomplete|download)"),
        ("html", "(?i:web page)"),
        ("missing keys", r"1 missing: blocks\.1\.ffn\.0\.bias"),
        ("wrong shape", r"1 of the wrong shape: blocks\.1\.ffn\.0\.bias \(3,\) instead of \(512,\)"),
        ("flat patches", r"patch_embedding\.weight has the shape \[256, 64\], and 5 axes are read"),
        ("t2v with an image branch", "ComfyUI knows no Wan model of 16 channels with these keys"),
        ("vae", "(?i:vae)"),
        ("umt5", "(?i:text encoder)"),
    ],
)
def test_a_bad_model_file_is_named(files, folders, how, message):
    broken(folders["diffusion_models"] / "bad.safetensors", how, files)
    with pytest.raises(ValueError, match=r"^Wan21ModelLoader: bad\.safetensors: .*" + message):
        Wan21ModelLoader.execute("bad.safetensors", "default")


@pytest.mark.parametrize(
    "node, folder, how, message",
    [
        (Wan21VAELoader, "vae", "i2v", "(?i:diffusion model)"),
        (Wan21VAELoader, "vae", "truncated", "(?i:truncated|incomplete|download)"),
        (Wan21TextEncoderLoader, "text_encoders", "vae", "(?i:vae)"),
    ],
)
def test_a_file_of_another_kind_is_named(files, folders, node, folder, how, message):
    broken(folders[folder] / "bad.safetensors", how, files)
    with pytest.raises(ValueError, match=rf"^{node.__name__}: bad\.safetensors: .*" + message):
        node.execute("bad.safetensors", "auto" if folder == "vae" else "default")


PICKED_IN = [
    (Wan21VAELoader, "i2v", "a Wan2.1 diffusion model; pick it in Wan21ModelLoader"),
    (Wan21ModelLoader, "vae", "the Wan2.1 VAE; pick it in Wan21VAELoader"),
    (Wan21ModelLoader, "umt5", "a umT5 text encoder; pick it in Wan21TextEncoderLoader"),
    (Wan21VAELoader, "lora", "a LoRA; load the base model here and the LoRA with Wan21LoraLoader"),
    (Wan21ModelLoader, "clip", "a CLIP vision model; pick it in the host's CLIPVisionLoader"),
    (Wan21ModelLoader, "sd", "an SD or SDXL checkpoint; pick a Wan2.1 file"),
]
KEYS = {
    "lora": "diffusion_model.blocks.0.self_attn.q.lora_A.weight",
    "clip": "vision_model.embeddings.class_embedding",
    "sd": "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
}


@pytest.mark.parametrize("node, how, words", PICKED_IN)
def test_the_node_for_a_file_of_another_kind_is_named(files, folders, node, how, words):
    folder = {Wan21VAELoader: "vae", Wan21ModelLoader: "diffusion_models"}[node]
    path = folders[folder] / "bad.safetensors"
    if how in KEYS:
        save_file({KEYS[how]: torch.zeros(2, 2)}, path)
    else:
        broken(path, how, files)
    with pytest.raises(ValueError) as error:
        node.execute("bad.safetensors", "auto" if folder == "vae" else "default")
    message = str(error.value)
    assert message.startswith(f"{node.__name__}: bad.safetensors: this file is not ")
    assert message.endswith(f". It is {words}.")


@pytest.mark.parametrize("how", ["truncated", "html", "missing keys", "vae"])
def test_a_file_is_named_once(files, folders, how):
    broken(folders["diffusion_models"] / "bad.safetensors", how, files)
    with pytest.raises(ValueError) as error:
        Wan21ModelLoader.execute("bad.safetensors", "default")
    assert str(error.value).count("bad.safetensors") == 1


def test_another_shard_of_the_set_is_named(folders):
    folder = folders["diffusion_models"]
    for i in (1, 2):
        save_file({f"blocks.{i}.weight": torch.zeros(9)}, folder / f"wan-{i:05d}-of-00002.safetensors")
    second = folder / "wan-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-4])
    with pytest.raises(ValueError, match=r"^Wan21ModelLoader: wan-00002-of-00002\.safetensors: truncated"):
        Wan21ModelLoader.execute("wan-00001-of-00002.safetensors", "default")


def test_a_wan22_vae_is_named(folders):
    state = {
        "decoder.upsamples.0.upsamples.0.residual.2.weight": torch.zeros(1),
        "decoder.middle.0.residual.0.gamma": torch.zeros(1),
    }
    save_file(state, folders["vae"] / "wan22.safetensors")
    with pytest.raises(ValueError, match=r"Wan2\.2"):
        Wan21VAELoader.execute("wan22.safetensors", "auto")


def test_nothing_is_left_of_a_failed_load(files, folders, models, prompts, sample):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
    before = sample(models["t2v"], *prompts, latent)[0]["samples"]
    broken(folders["diffusion_models"] / "bad.safetensors", "missing keys", files)
    with pytest.raises(ValueError):
        Wan21ModelLoader.execute("bad.safetensors", "default")
    assert torch.equal(sample(models["t2v"], *prompts, latent)[0]["samples"], before)
    assert host.is_ours(models["t2v"])


def test_extra_keys_are_left_out_and_named(files, folders, models, caplog):
    extra = {"fps_embedding.weight": torch.zeros(2, 4), "rope.freqs_cos": torch.zeros(3)}
    extra["blocks.0.self_attn.q.scale_input"] = torch.ones(())  # of a layer that is not quantised
    save_file(load_file(files["t2v"]) | extra, folders["diffusion_models"] / "sky.safetensors", METADATA)
    save_file(load_file(files["vae"]) | {"scale": torch.zeros(16)}, folders["vae"] / "buffer.safetensors")
    with caplog.at_level("INFO"):
        model = Wan21ModelLoader.execute("sky.safetensors", "default").result[0]
        Wan21VAELoader.execute("buffer.safetensors", "fp32")
    assert same_weights(model, models["t2v"])
    words = "keys are no part of the model and are left out:"
    names = "fps_embedding.weight, rope.freqs_cos, blocks.0.self_attn.q.scale_input"
    note = f"sky.safetensors: 3 {words} {names}"
    assert note in caplog.text and host.notes_on_file(model.clone()) == [note]
    assert host.notes_on_file(models["t2v"]) == []
    assert f"buffer.safetensors: 1 {words} scale" in caplog.text


def test_models_are_listed_by_the_hosts_rules(files, folders, models, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "A.GGUF").touch()
    (folders["diffusion_models"] / "linked").symlink_to(elsewhere)
    assert [n.replace("\\", "/") for n in model_names() if "linked" in n] == ["linked/A.GGUF"]
    (elsewhere / "b.gguf").touch()
    assert sum("linked" in n for n in model_names()) == 2
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    folder_paths.add_model_folder_path("checkpoints", str(checkpoints), is_default=True)
    whole = {f"model.diffusion_model.{k}": v for k, v in load_file(files["t2v"]).items()}
    save_file(whole, checkpoints / "all-in-one.safetensors", METADATA)
    assert "all-in-one.safetensors" in model_names()
    model = Wan21ModelLoader.execute("all-in-one.safetensors", "default").result[0]
    assert same_weights(model, models["t2v"])


@pytest.mark.parametrize("shape", [(1000, 1, 1, 1), (2**20, 1, 1, 1), (0, 1, 1, 1), (), (4, 4)])
def test_a_vae_is_measured_before_it_is_built(files, folders, shape):
    """4 KB that state 1000 channels had taken 1.7 TB."""
    state = load_file(files["vae"]) | {"decoder.head.0.gamma": torch.ones(shape)}
    save_file(state, folders["vae"] / "vae.safetensors")
    with pytest.raises(ValueError, match=r"^Wan21VAELoader: vae\.safetensors: .*decoder\.(head|conv1)"):
        Wan21VAELoader.execute("vae.safetensors", "auto")


@pytest.mark.parametrize("key", ["conv1.weight_scale", "conv1.scale_weight", "conv1.comfy_quant"])
def test_a_quantised_vae_is_named(files, folders, key):
    """Its weights without the scales are noise."""
    save_file(load_file(files["vae"]) | {key: torch.ones(1)}, folders["vae"] / "vae.safetensors")
    with pytest.raises(ValueError, match=rf"safetensors: its weights are quantised \({key}\), and a VAE is"):
        Wan21VAELoader.execute("vae.safetensors", "auto")


def test_sizes_in_the_metadata_are_not_believed(files, folders, models):
    """The host had taken them, and no longer known the model."""
    config = {"transformer": {"image_model": "other", "dim": [], "in_dim": 99, "text_dim": 128}}
    path = folders["diffusion_models"] / "t2v.safetensors"
    save_file(load_file(files["t2v"]), path, {"config": json.dumps(config)})
    model = Wan21ModelLoader.execute("t2v.safetensors", "default").result[0]
    assert same_weights(model, models["t2v"])
    assert model.model.model_config.unet_config["num_heads"] == 2


Q = "encoder.block.1.layer.0.SelfAttention.q.weight"
INCOMPLETE = {
    "a matrix": ({Q: None}, rf"1 missing: {Q}"),
    "a norm": (
        {"encoder.block.1.layer.1.layer_norm.weight": None},
        "1 missing: encoder.block.1.layer.1",
    ),
    "a whole block": ({"encoder.block.0.": None}, r"lacks encoder\.block\.0\.layer\.0"),
    "of another shape": ({Q: torch.zeros(3, 3)}, rf"1 of the wrong shape: {Q} \(3, 3\)"),
    "other positions": (
        {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": torch.zeros(16, 4)},
        "1 of the wrong shape: .*relative_attention_bias",
    ),
}


def without(state, changes):
    for key, value in changes.items():
        state = {k: v for k, v in state.items() if not k.startswith(key)}
        state |= {} if value is None else {key: value}
    return state


@pytest.mark.parametrize("case", INCOMPLETE)
def test_a_text_encoder_that_lacks_weights_is_refused(files, folders, case):
    """It had been used with what happened to lie in memory in their place."""
    changes, words = INCOMPLETE[case]
    path = folders["text_encoders"] / "part.safetensors"
    save_file(without(load_file(files["umt5"]), changes), path)
    with pytest.raises(ValueError, match=rf"^Wan21TextEncoderLoader: part\.safetensors: .*{words}"):
        Wan21TextEncoderLoader.execute("part.safetensors", "default")
    assert "part.safetensors" not in read_traits("text_encoder", path, None).refusal
    assert re.search(words, read_traits("text_encoder", path, None).refusal)


def test_extra_keys_of_a_text_encoder_are_left_out_and_named(files, folders, prompts, caplog):
    extra = {"encoder.extra.bias": torch.zeros(3)}
    save_file(load_file(files["umt5"]) | extra, folders["text_encoders"] / "more.safetensors")
    with caplog.at_level("INFO"):
        clip = Wan21TextEncoderLoader.execute("more.safetensors", "default").result[0]
    words = "1 keys are no part of the model and are left out: encoder.extra.bias"
    assert f"more.safetensors: {words}" in caplog.text
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat walks through the grass"))
    assert torch.equal(cond[0][0], prompts[0][0][0])


TOKENIZERS = {
    "noise": torch.arange(200, dtype=torch.uint8),
    "nothing": torch.zeros(0, dtype=torch.uint8),
    "zeros": torch.zeros(900, dtype=torch.uint8),
    "16 bits": torch.ones(30, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("case", [*TOKENIZERS, "cut short"])
def test_a_damaged_tokenizer_is_named(files, folders, case):
    state = load_file(files["umt5"])
    state["spiece_model"] = TOKENIZERS[case] if case in TOKENIZERS else state["spiece_model"][:-30].clone()
    save_file(state, folders["text_encoders"] / "umt5.safetensors")
    with pytest.raises(ValueError, match=r"^Wan21TextEncoderLoader: umt5\.safetensors: its spiece_model "):
        Wan21TextEncoderLoader.execute("umt5.safetensors", "default")


def test_a_tokenizer_of_another_encoder_is_named(files, folders):
    """Its pieces beyond the vocabulary had no features, which on a GPU ends the process."""
    state = load_file(files["umt5"])
    pieces = len(state["shared.weight"])
    save_file(
        state | {"shared.weight": state["shared.weight"][:-9].clone()},
        folders["text_encoders"] / "u.safetensors",
    )
    with pytest.raises(
        ValueError, match=rf"knows \d+ pieces of text, and the encoder has features for {pieces - 9}"
    ):
        Wan21TextEncoderLoader.execute("u.safetensors", "default")


def test_text_encoder_from_gguf_with_its_own_tokenizer(files, folders, prompts):
    write_umt5(load_file(files["umt5"]), folders["text_encoders"] / "umt5-Q8_0.GGUF")
    assert "umt5-Q8_0.GGUF" in gguf_names("text_encoders")
    clip = Wan21TextEncoderLoader.execute("umt5-Q8_0.GGUF", "default").result[0]
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("a cat walks through the grass"))
    assert 0 < relative(cond[0][0], prompts[0][0][0]) < 0.05


def test_a_damaged_tokenizer_in_gguf_is_named(files, folders):
    write_umt5(load_file(files["umt5"]), folders["text_encoders"] / "umt5.gguf", scores=False)
    with pytest.raises(ValueError, match=r"^Wan21TextEncoderLoader: umt5\.gguf: the tokenizer .* is damaged"):
        Wan21TextEncoderLoader.execute("umt5.gguf", "default")


def test_a_diffusion_model_in_gguf_is_no_text_encoder(folders):
    path = folders["text_encoders"] / "flux.gguf"
    writer = gguf.GGUFWriter(str(path), "flux")
    writer.add_tensor("double_blocks.0.weight", np.zeros((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"general\.architecture is 'flux'.* Pick a umT5 file"):
        Wan21TextEncoderLoader.execute("flux.gguf", "default")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, "scaled fp8", "gguf"])
def test_a_weight_of_nan_is_found(files, folders, stored):
    """A run that gave NaN had been blamed on fp16 and on the attention."""
    key, state = "blocks.1.ffn.0.weight", load_file(files["t2v"])
    spoilt = state | {key: torch.full_like(state[key], torch.nan)}
    for name, weights in (("whole", state), ("spoilt", spoilt)):
        path = folders["diffusion_models"] / f"{name}.safetensors"
        if stored == "gguf":
            path = path.with_suffix(".gguf")
            path.write_bytes(as_gguf(weights))
        elif stored == "scaled fp8":
            weights = as_fp8(weights, True)
            save_file(weights, path, METADATA)
        else:
            save_file({k: v.to(stored) for k, v in weights.items()}, path, METADATA)
        model = Wan21ModelLoader.execute(path.name, "default").result[0]
        assert host.spoilt_weight(model.model.diffusion_model) == (key if name == "spoilt" else None)


def as_gguf(weights):
    """Matrices in Q8_0."""
    made = Gguf.made_of(weights)
    kind = gguf.GGMLQuantizationType.Q8_0
    with np.errstate(invalid="ignore"):
        made.tensors = [
            (name, shape, int(kind), gguf.quants.quantize(weights[name].numpy(), kind).tobytes())
            if len(shape) == 2 and shape[0] % 32 == 0
            else (name, shape, number, data)
            for name, shape, number, data in made.tensors
        ]
    return made.raw()
