"""Another strength of a LoRA compiles nothing again and leaves the base weights where they are."""

import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from safetensors.torch import save_file
from torch._dynamo.utils import counters
from wan21 import host

NAME = "diffusion_model.blocks.1.ffn.0"


@pytest.mark.parametrize("weight_dtype", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("schedule", [(), (1.0, 0.5, 0.25)], ids=["constant", "schedule"])
def test_another_strength(files, prompts, sample, tmp_path, weight_dtype, schedule):
    file = {f"{NAME}.lora_A.weight": torch.ones(4, 256) / 16, f"{NAME}.lora_B.weight": torch.ones(512, 4)}
    save_file(file, tmp_path / "lora.safetensors")
    torch._dynamo.reset()
    counters.clear()
    base = host.load_model(files["t2v"], weight_dtype)
    weights = {k: v.data_ptr() for k, v in base.model.named_parameters() if k != f"{NAME}.weight"}
    compiled = TorchCompileModel.execute(base, "eager").result[0]
    lora = host.read_lora(tmp_path / "lora.safetensors", base)
    graphs, results = [], []
    for strength in (1.0, 0.7, 0.4, 0.2):
        latents = []
        for model in (compiled, base):
            latent = {"samples": torch.zeros(1, 16, 2, 4, 4)}
            patched = host.add_lora(model, lora, strength, schedule)
            latents.append(sample(patched, *prompts, latent, steps=3)[0]["samples"])
        assert torch.equal(*latents)
        results.append(latents[0])
        graphs.append(counters["stats"]["unique_graphs"])
    assert not torch.equal(results[1], results[2])
    assert {k: v.data_ptr() for k, v in base.model.named_parameters() if k in weights} == weights
    assert graphs[0] > 0 and len(set(graphs)) == 1, graphs
    torch._dynamo.reset()
