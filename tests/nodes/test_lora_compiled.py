"""Another strength of a LoRA compiles nothing again and leaves the base weights where they are."""

import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from wan21.nodes import host


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("schedule", [(), (1.0, 0.5, 0.25)], ids=["merged", "schedule"])
def test_another_strength(files, prompts, sample, tmp_path, weight_dtype, schedule):
    name = "diffusion_model.blocks.1.ffn.0"
    file = {f"{name}.lora_A.weight": torch.ones(4, 256) / 16, f"{name}.lora_B.weight": torch.ones(512, 4)}
    save_file(file, tmp_path / "lora.safetensors")
    torch._dynamo.reset()
    counters.clear()
    base = host.load_model(files["t2v"], weight_dtype)
    weights = {k: v.data_ptr() for k, v in base.model.named_parameters() if k != f"{name}.weight"}
    model = TorchCompileModel.execute(base, "eager").result[0]
    lora = host.read_lora(tmp_path / "lora.safetensors", model)
    graphs, results = [], []
    for strength in (1.0, 0.7, 0.4, 0.2):
        patched = host.add_lora(model, lora, strength, schedule)
        latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
        results.append(sample(patched, *prompts, latent, steps=3)[0]["samples"])
        graphs.append(counters["stats"]["unique_graphs"])
    assert not torch.equal(results[1], results[2])
    assert {k: v.data_ptr() for k, v in base.model.named_parameters() if k in weights} == weights
    assert len(set(graphs[1:])) == 1, graphs
