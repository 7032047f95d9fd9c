"""A MODEL in the host's quantised formats is saved and merged with its LoRA, or refused by name."""

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from comfy_extras.nodes_lora_extract import LoraSave
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from test_lora import METADATA, load, loras, low_rank  # noqa: F401 (fixtures)
from test_lora_merged_schedule import other_file  # noqa: F401 (fixture)
from test_weights import quantise
from wan21 import host

JOB = ({"samples": torch.zeros(1, 16, 2, 4, 4)}, [1.0, 0.5, 0.0], 3.0, 5)


def query_lora():
    """The same in whatever order tests run: what int8 makes of it differs from one to another."""
    return low_rank("diffusion_model.blocks.0.self_attn.q", generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8_tensorwise"])
def test_saved_and_read_again(files, prompts, sample, loras, tmp_path, name):  # noqa: F811
    save_file(quantise(load_file(files["t2v"]), name)[0], tmp_path / "model.safetensors", metadata=METADATA)
    save_file(query_lora(), loras / "a.safetensors")
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


def simple(ratio):
    return lambda a, b: ModelMergeSimple().merge(a, b, ratio)[0]


MERGES = {
    "first": lambda lora, plain, other: simple(0.6)(lora, other),
    "second": lambda lora, plain, other: simple(0.4)(other, lora),
    "cut out": lambda lora, plain, other: ModelAdd().merge(other, ModelSubtract().merge(lora, plain, 1.0)[0])[
        0
    ],
}


@pytest.fixture
def pairs(files, other_file, tmp_path, loras):  # noqa: F811
    """By format, None for float32: MODELs of two files; beside them a LoRA."""
    save_file(query_lora(), loras / "a.safetensors")

    def read(path, name):
        if name is None:
            return host.load_model(path)
        save_file(quantise(load_file(path), name)[0], tmp_path / path.name, metadata=METADATA)
        return host.load_model(tmp_path / path.name)

    return lambda name: [read(path, name) for path in (files["t2v"], other_file)]


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8_tensorwise"])
def test_merged_as_in_float32(pairs, prompts, name, merge):
    effects = []
    for format in (None, name):
        plain, other = pairs(format)
        lora = load(plain, "a.safetensors", 4.0)[0]  # far above what int8 makes of the inputs of products
        with_it, without = (host_euler(merge(m, plain, other), *prompts, *JOB) for m in (lora, plain))
        effects.append(with_it - without)
    assert effects[0].norm() > 0 and relative(effects[1], effects[0]) < 0.3


def test_a_hook_and_a_lora_cut_out_are_refused_by_name(pairs, prompts):
    plain, _ = pairs("float8_e4m3fn")
    [hooks] = CreateHookLora().create_hook("a.safetensors", 1.0, 0.0)
    hooked = [ConditioningSetProperties().set_properties(c, 1.0, "default", hooks=hooks)[0] for c in prompts]
    before = host_euler(plain, *prompts, *JOB)
    with pytest.raises(ValueError, match=r"quantised formats are not changed in place.*Wan21LoraLoader"):
        host_euler(plain, *hooked, *JOB)
    assert torch.equal(host_euler(plain, *prompts, *JOB), before)
    difference = ModelSubtract().merge(load(plain, "a.safetensors")[0], plain, 1.0)[0]
    with pytest.raises(ValueError, match=r"quantised formats.*saved as a LoRA.*bf16 or fp16"):
        LoraSave.execute("a", 8, "standard", True, difference)
