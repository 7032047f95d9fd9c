"""What a job leaves behind."""

import gc

import bench_load
import pytest
import torch
from safetensors.torch import save_file
from wan21 import host

JOBS = 20


def held_bytes():
    """Memory of this process that the system cannot take back."""
    gc.collect()
    return bench_load.resident()["RssAnon"]


def tensor_bytes():
    """Storages of all tensors that Python can reach, without those of frozen objects."""
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":  # no fake ones
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def bytes_before():
    """Of the tensors there are before the test, which then walks through new objects only."""
    before = tensor_bytes()
    gc.freeze()
    yield before
    gc.unfreeze()


def test_twenty_jobs_leave_memory_flat(bytes_before, files, prompts, sample, tmp_path):
    """Every job has another model, LoRA or size; after the third nothing grows by more than 5 %."""
    loras = []
    for i in range(2):
        name = f"diffusion_model.blocks.{i}.self_attn.q"
        file = {f"{name}.lora_A.weight": torch.randn(4, 256), f"{name}.lora_B.weight": torch.randn(256, 4)}
        loras.append(tmp_path / f"{i}.safetensors")
        save_file(file, loras[-1])
    process, tensors = [], []
    for i in range(JOBS):
        model = host.load_model(files["t2v"])
        model = host.add_lora(model, host.read_lora(loras[i % 2], model), 1.0, (1.0, 0.5) if i % 3 else ())
        latent = {"samples": torch.zeros(1, 16, 2 + i % 2, 4 + 2 * (i % 3), 6)}
        cached = dict(cache__multiplier=2.0, cache__profile="t2v_1.3b") if i % 4 == 3 else {}
        sample(model, *prompts, latent, steps=2, **cached)
        del model, latent
        process.append(held_bytes())
        tensors.append(bytes_before + tensor_bytes())
    assert max(process[3:]) < 1.05 * max(process[:3]), process
    assert max(tensors[3:]) < 1.05 * max(tensors[:3]), tensors


@pytest.mark.parametrize("weight_dtype, at_most", [("default", 0.1), ("fp8_e4m3fn", 1.15)])
def test_loading_holds_no_second_copy(weight_dtype, at_most):
    """Of a bf16 file: mapped as it is, or converted tensor by tensor."""
    most, size = bench_load.measure(0.2, weight_dtype)
    assert most["RssAnon"] < at_most * most["weights"], most
    assert most["weights"] < 1.01 * size
