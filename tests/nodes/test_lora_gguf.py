"""A MODEL with packed weights among the host's nodes: LoRAs of both loaders, merges, saving."""

import folder_paths
import pytest
import torch
from comfy_extras.nodes_lora_extract import LoraSave
from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSubtract
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from test_gguf import dense, pair  # noqa: F401 (fixtures)
from test_lora import load, loras, low_rank  # noqa: F401 (fixtures)
from wan21 import host

from nodes import LoraLoaderModelOnly

QUERY = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture
def run(prompts):
    def run(model):
        latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
        return host_euler(model, *prompts, latent, [1.0, 0.5, 0.0], 3.0, 5)

    return run


@pytest.fixture
def lora(loras):  # noqa: F811
    save_file(low_rank(QUERY), loras / "a.safetensors")
    return "a.safetensors"


def test_loras_of_both_loaders_add_up_in_either_order(pair, run, lora):  # noqa: F811
    def theirs(model):
        return LoraLoaderModelOnly().load_lora_model_only(model, lora, 0.5)[0]

    def ours(model):
        return load(model, lora, 0.5)[0]

    model = host.load_model(pair[0])
    plain, expected = run(model), run(load(model, lora)[0])
    assert relative(expected, plain) > 5e-3
    for _ in range(2):  # the second finds the weights as the first left them
        for first, second in ((theirs, ours), (ours, theirs), (ours, ours)):
            fresh = host.load_model(pair[0])
            assert relative(run(second(first(fresh))), expected) < 1e-3
            assert relative(run(second(first(model))), expected) < 1e-3
    assert torch.equal(run(model), plain)


def test_merged_with_another_as_its_unpacked_weights_would_be(pair, files, run, tmp_path):  # noqa: F811
    other = {k: torch.roll(v, 1, 0) for k, v in load_file(files["t2v"]).items()}
    other = dense(other, tmp_path / "other.safetensors")
    packed, unpacked = host.load_model(pair[0]), dense(pair[1], tmp_path / "unpacked.safetensors")
    for merge in (lambda m: (m, other), lambda m: (other, m)):
        ours, expected = (run(ModelMergeSimple().merge(*merge(m), 0.5)[0]) for m in (packed, unpacked))
        assert relative(ours, expected) < 1e-3


def test_hook_loras_act_as_the_hosts_loader_and_are_refused_on_packed_bytes(pair, files, prompts, lora):  # noqa: F811
    from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora

    [hooks] = CreateHookLora().create_hook(lora, 1.0, 0.0)
    hooked = [ConditioningSetProperties().set_properties(c, 1.0, "default", hooks=hooks)[0] for c in prompts]
    job = ({"samples": torch.zeros(1, 16, 2, 4, 4)}, [1.0, 0.5, 0.0], 3.0, 5)
    with pytest.raises(ValueError, match="hooks carry a LoRA, and a GGUF model's packed weights"):
        host_euler(host.load_model(pair[0]), *hooked, *job)
    for dtype in ("default", "fp8_e4m3fn"):
        model = host.load_model(files["t2v"], dtype)
        plain = host_euler(model, *prompts, *job)
        loaded = host_euler(LoraLoaderModelOnly().load_lora_model_only(model, lora, 1.0)[0], *prompts, *job)
        assert relative(loaded, plain) > 5e-3
        assert relative(host_euler(model, *hooked, *job), loaded) < 1e-6
        assert torch.equal(host_euler(model, *prompts, *job), plain)


def test_lora_save_takes_a_difference_and_refuses_packed_bytes(pair, lora, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    model = host.load_model(pair[0])
    patched = load(model, lora)[0]
    for packed in (model, patched):
        with pytest.raises(ValueError, match="packed as in its GGUF file"):
            LoraSave.execute("a", 8, "full_diff", True, packed)
    LoraSave.execute("a", 8, "full_diff", True, ModelSubtract().merge(patched, model, 1.0)[0])
    (saved,) = tmp_path.rglob("a_*.safetensors")
    file = load_file(saved)
    expected = low_rank_product(load_file(tmp_path / lora))
    assert relative(file[f"{QUERY}.diff"].float(), expected) < 0.02


def low_rank_product(file):
    return file[f"{QUERY}.lora_B.weight"] @ file[f"{QUERY}.lora_A.weight"]
