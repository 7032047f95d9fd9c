"""With the host's dynamic memory, files are read by the host's own reader: on the pretended GPU only."""

import sys

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from helpers import relative
from safetensors.torch import load_file, save_file
from wan21 import host
from wan21.host import reader
from wan21.wan.files import BadFile

CONFIG = {"config": '{"transformer": {"text_dim": 128}}'}


@pytest.fixture(autouse=True)
def dynamic():
    if not comfy.memory_management.aimdo_enabled:
        pytest.skip("for a pretended GPU with dynamic memory")


@pytest.fixture
def job(prompts):
    return (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})


def slices(module):
    """Bytes in the file of each parameter; those of a tensor that the host cannot read there are None."""
    found = {}
    for name, parameter in module.named_parameters():
        stored = getattr(parameter, "_qdata", parameter).untyped_storage()
        found[name] = getattr(getattr(stored, "_comfy_tensor_file_slice", None), "size", None)
    return found


def sharded(state, folder):
    """A state dict in two files. -> the first"""
    keys = sorted(state)
    for i, part in enumerate((keys[::2], keys[1::2]), 1):
        part = {key: state[key] for key in part}
        save_file(part, folder / f"wan-0000{i}-of-00002.safetensors", metadata=CONFIG)
    return folder / "wan-00001-of-00002.safetensors"


def in_bf16(state, folder):
    save_file({key: value.bfloat16() for key, value in state.items()}, folder / "b.safetensors", CONFIG)
    return folder / "b.safetensors"


@pytest.mark.parametrize("kind", ["one file", "shards", "bf16"])
def test_a_model_is_read_from_its_file_to_the_device(files, job, sample, models, tmp_path, kind):
    state = load_file(files["t2v"])
    path = {"one file": lambda *_: files["t2v"], "shards": sharded, "bf16": in_bf16}[kind](state, tmp_path)
    read = sys.modules["pretended_aimdo"].slices_read
    read.clear()
    model = host.load_model(path)
    found = slices(model.model.diffusion_model)
    # Tensors outside layers (modulation) the host puts on the device as it loads a model.
    assert {key for key, size in found.items() if size is None} <= {k for k in found if "modulation" in k}
    assert found["blocks.0.ffn.0.weight"] == 512 * 256 * (2 if kind == "bf16" else 4)
    ours, expected = (sample(m, *job, steps=1)[0]["samples"] for m in (model, models["t2v"]))
    assert relative(ours, expected) < (0.05 if kind == "bf16" else 1e-6)
    sizes = {size for _, size in read}
    assert {size for key, size in found.items() if key.startswith("blocks") and size} <= sizes


def test_text_encoder_vae_and_lora_as_well(files, tmp_path, monkeypatch):
    management = comfy.model_management  # which encodes texts on the CPU where it computes in float32
    monkeypatch.setattr(management, "text_encoder_device", management.get_torch_device)
    clip, vae = host.load_text_encoder(files["umt5"]), host.load_vae(files["vae"])
    assert slices(clip.cond_stage_model)["umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"]
    assert slices(vae.first_stage_model)["decoder.middle.0.residual.2.weight"]
    down, up = torch.randn(4, 256), torch.randn(512, 4)
    name = "diffusion_model.blocks.0.ffn.0"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "lora.safetensors")
    lora = host.read_lora(tmp_path / "lora.safetensors", host.load_model(files["t2v"]))
    (_, patch) = lora.patches[0]
    assert torch.equal(patch.factors[0], up)
    assert patch.factors[0].untyped_storage()._comfy_tensor_file_slice.size == up.nbytes


@pytest.mark.parametrize("damage", ["truncated", "overlapping", "a type that the host does not have"])
def test_what_a_file_states_is_measured_first(files, tmp_path, damage):
    path = tmp_path / "wan.safetensors"
    if damage == "a type that the host does not have":
        state = {"head": torch.zeros(4, dtype=torch.float8_e8m0fnu)}
        save_file(state, path)
        assert reader.read_checkpoint(path).state_dict["head"].dtype == torch.float8_e8m0fnu
        return
    save_file({"a": torch.zeros(64), "b": torch.zeros(64)}, path)
    data = path.read_bytes()
    data = data[:-8] if damage == "truncated" else data.replace(b"[256,512]", b"[255,511]")
    path.write_bytes(data)
    with pytest.raises(BadFile, match=r"wan\.safetensors: (truncated|a damaged safetensors file)"):
        reader.read_checkpoint(path)
