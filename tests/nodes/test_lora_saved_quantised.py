"""A MODEL in the host's quantised formats is saved with its LoRA."""

import comfy.sd
import pytest
import torch
from helpers import relative
from safetensors.torch import load_file, save_file
from test_lora import METADATA, load, loras, low_rank  # noqa: F401 (fixtures)
from test_weights import quantise
from wan21 import host


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8_tensorwise"])
def test_saved_and_read_again(files, prompts, sample, loras, tmp_path, name):  # noqa: F811
    save_file(quantise(load_file(files["t2v"]), name)[0], tmp_path / "model.safetensors", metadata=METADATA)
    save_file(low_rank("diffusion_model.blocks.0.self_attn.q"), loras / "a.safetensors")
    model = host.load_model(tmp_path / "model.safetensors")
    patched = load(model, "a.safetensors")[0]
    rest = (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    plain, changed = (sample(m, *rest)[0]["samples"] for m in (model, patched))
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patched)
    read = sample(host.load_model(tmp_path / "saved.safetensors"), *rest)[0]["samples"]
    # Saved weights are rounded to 8 bits again, most coarsely in int8, whose products also round their input
    # in another way for each weight; without the LoRA it would be 1.
    assert relative(read, changed) < 0.75 * relative(changed, plain)
