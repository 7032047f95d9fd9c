"""A LoRA under a schedule on the first MODEL of a merge: it keeps that MODEL's share, as its weights do."""

import logging

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_hooks import ConditioningSetProperties, CreateHookLora
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeBlocks, ModelMergeSimple, ModelSubtract
from comfy_extras.nodes_model_merging_model_specific import ModelMergeWAN2_1
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from test_lora import METADATA, load, loras, low_rank  # noqa: F401 (fixtures)
from wan21 import host

NEARLY_ONE = "1, 1.0001"  # a schedule whose run is that of a strength of 1
LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
SIGMAS = [1.0, 0.5, 0.0]


@pytest.fixture
def lora(loras):  # noqa: F811
    generator = torch.Generator().manual_seed(7)
    file = low_rank("diffusion_model.blocks.0.self_attn.q") | low_rank("diffusion_model.blocks.1.ffn.0", 512)
    file["diffusion_model.blocks.1.diff_m"] = torch.randn(1, 6, 256, generator=generator) / 16
    file["diffusion_model.head.diff_m"] = torch.randn(1, 2, 256, generator=generator) / 16
    file["diffusion_model.blocks.1.cross_attn.o.diff_b"] = torch.randn(256, generator=generator) / 16
    save_file(file, loras / "a.safetensors")
    return "a.safetensors"


@pytest.fixture(scope="module")
def other_file(files, tmp_path_factory):
    """A MODEL's file of other weights."""
    generator = torch.Generator().manual_seed(11)
    weights = {
        key: value + 0.1 * value.std(unbiased=False) * torch.randn(value.shape, generator=generator)
        for key, value in load_file(files["t2v"]).items()
    }
    path = tmp_path_factory.mktemp("other") / "other.safetensors"
    save_file(weights, path, metadata=METADATA)
    return path


def run(model, prompts):
    return host_euler(model, *prompts, LATENT, SIGMAS, 3.0, 5)


def simple(ratio):
    return lambda a, b: ModelMergeSimple().merge(a, b, ratio)[0]


def by_part(a, b):
    shares = {"patch_embedding.": 1.0, "blocks.0.": 0.25, "blocks.1.": 0.75, "head.": 0.0}
    return ModelMergeWAN2_1().merge(a, b, **shares)[0]


MERGES = {
    "0": simple(0.0),
    "0.3": simple(0.3),
    "1": simple(1.0),
    "blocks": by_part,
    "unet blocks": lambda a, b: ModelMergeBlocks().merge(a, b, input=0.5, middle=0.5, out=0.5)[0],
    "twice": lambda a, b: simple(0.5)(simple(0.5)(a, b), b),
    "added": lambda a, b: ModelAdd().merge(a, ModelSubtract().merge(b, b, 1.0)[0])[0],
    "subtracted": lambda a, b: ModelAdd().merge(ModelSubtract().merge(a, b, 0.5)[0], b)[0],
}


@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn", "native"])
@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_a_schedule_keeps_the_share_of_its_model(files, other_file, prompts, lora, dtype, merge):
    read = comfy.sd.load_diffusion_model if dtype == "native" else lambda path: host.load_model(path, dtype)
    first, second = read(str(files["t2v"])), read(str(other_file))
    scheduled, constant = (load(first, lora, 1.0, schedule)[0] for schedule in (NEARLY_ONE, ""))
    plain, expected, ours = (run(merge(model, second), prompts) for model in (first, constant, scheduled))
    whole = relative(run(constant, prompts), run(first, prompts))
    assert relative(ours, expected) < (0.3 if dtype == "fp8_e4m3fn" else 1e-3) * whole
    assert torch.equal(run(merge(first, second), prompts), plain)  # nothing stays


def test_two_schedules_in_a_row_and_a_lora_loaded_after_the_merge(files, other_file, prompts, lora):
    first, second = host.load_model(files["t2v"]), host.load_model(other_file)

    def made(schedule):
        model = load(load(first, lora, 0.6, schedule)[0], lora, 0.8, schedule)[0]
        return load(ModelMergeSimple().merge(model, second, 0.4)[0], lora, 0.5, schedule)[0]

    expected, ours = (run(made(schedule), prompts) for schedule in ("", NEARLY_ONE))
    plain = run(ModelMergeSimple().merge(first, second, 0.4)[0], prompts)
    assert relative(ours, expected) < 1e-3 * relative(plain, expected)


def test_hooks_add_to_a_schedule_as_to_one_strength(files, prompts, lora, loras):  # noqa: F811
    """The host asks for the patches of a MODEL for its hooks as for a merge."""
    save_file(low_rank("diffusion_model.blocks.1.self_attn.v"), loras / "hook.safetensors")
    [hooks] = CreateHookLora().create_hook("hook.safetensors", 1.0, 0.0)
    hooked = [ConditioningSetProperties().set_properties(c, 1.0, "default", hooks=hooks)[0] for c in prompts]
    model = host.load_model(files["t2v"])
    expected, ours = (run(load(model, lora, 1.0, schedule)[0], hooked) for schedule in ("", NEARLY_ONE))
    assert relative(ours, expected) < 1e-3 * relative(run(model, prompts), expected)


def test_modulation_that_a_merge_of_native_models_leaves_out_is_said(files, other_file, lora, caplog):
    native, other = (comfy.sd.load_diffusion_model(str(path)) for path in (files["t2v"], other_file))
    with caplog.at_level(logging.INFO):
        simple(0.5)(load(native, lora)[0], other)
        assert "leaves out" not in caplog.text
        simple(0.5)(other, load(native, lora)[0])
    assert (
        "changes blocks.1.modulation, head.modulation, which a merge into a MODEL of the host's"
        in caplog.text
    )


def test_a_dora_under_a_schedule_is_refused_where_a_share_of_its_model_is_taken(files, loras):  # noqa: F811
    name = "diffusion_model.blocks.0.self_attn.q"
    save_file(low_rank(name) | {f"{name}.dora_scale": torch.ones(256, 1)}, loras / "dora.safetensors")
    model = host.load_model(files["t2v"])
    scheduled = load(model, "dora.safetensors", 1.0, "1, 0.5")[0]
    with pytest.raises(ValueError, match=r"a DoRA on the first MODEL has a strength_schedule.*merged MODEL"):
        ModelMergeSimple().merge(scheduled, model, 0.5)
    assert ModelMergeSimple().merge(scheduled, model, 1.0)[0].patches
