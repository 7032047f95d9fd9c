"""LoRAs stand in the host's patch list whatever the weights are, and are still not rounded to 8 bits."""

import comfy.sd
import pytest
import torch
from helpers import relative
from helpers_nodes import host_euler
from safetensors.torch import load_file, save_file
from test_lora import load, loras, low_rank  # noqa: F401 (fixtures)
from wan21 import host
from wan21.host.lora import _loras_at_use
from wan21.wan import lora as wl

QUERY = "diffusion_model.blocks.0.self_attn.q"
KEY = f"{QUERY}.weight"
MODULATION = "diffusion_model.blocks.1.modulation"


@pytest.fixture
def lora(loras):  # noqa: F811
    generator = torch.Generator().manual_seed(7)
    change = torch.randn(1, 6, 256, generator=generator) / 16
    file = low_rank(QUERY) | {"diffusion_model.blocks.1.diff_m": change}
    save_file(file, loras / "a.safetensors")
    return "a.safetensors", change


def changes(path, shapes):
    return dict(wl.match_lora(load_file(path), shapes).patches)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn", "fp8_e5m2"])
def test_saved_with_the_lora_and_not_twice_in_the_next_run(
    files,
    prompts,
    sample,
    lora,
    tmp_path,
    loras,  # noqa: F811
    dtype,
):
    model = host.load_model(files["t2v"], dtype)
    rest = (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    patched = load(model, lora[0])[0]
    before = sample(patched, *rest)[0]["samples"]
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(tmp_path / "saved.sft"), patched)
    saved = {k.removeprefix("model."): v for k, v in load_file(tmp_path / "saved.sft").items()}
    plain = load_file(files["t2v"])
    shapes = {k: tuple(v.shape) for k, v in plain.items()}
    for key, patch in changes(loras / lora[0], shapes).items():
        expected = wl.apply_patch(patch, plain[key].clone().float(), 1.0)
        change = saved["diffusion_model." + key].float() - plain[key].float()
        assert relative(change, expected - plain[key].float()) < 0.3, key
    assert torch.equal(sample(patched, *rest)[0]["samples"], before)
    assert not torch.equal(sample(model, *rest)[0]["samples"], before)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_two_models_merged_carry_the_lora_by_its_share(files, lora, dtype):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model = host.load_model(files["t2v"], dtype)
    patched = load(model, lora[0])[0]
    plain = model.model.state_dict()
    whole = None
    for ratio in (0.0, 0.5, 1.0):  # the share of the first model
        merged = ModelMergeSimple().merge(model, patched, ratio)[0]
        weight = merged.patch_weight_to_device(MODULATION, torch.device("cpu"), return_weight=True)
        change = (weight.float() - plain[MODULATION].float()).norm()
        whole = change if whole is None else whole
        assert whole > 0.1
        assert abs(change - (1 - ratio) * whole) < 0.1 * whole
        weight = merged.patch_weight_to_device(KEY, torch.device("cpu"), return_weight=True)
        moved = (weight.float() - plain[KEY].float()).norm() / plain[KEY].float().norm()
        assert (moved > 1e-2) if ratio < 1 else (moved < 0.05)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_merge_is_saved_with_the_modulation_that_it_runs_with(files, lora, tmp_path, dtype, is_first):
    """The host merges what belongs to layers into a file, and this parameter belongs to none."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    model = host.load_model(files["t2v"], dtype)
    patched = load(model, lora[0])[0]
    merged = ModelMergeSimple().merge(*((patched, model) if is_first else (model, patched)), 0.5)[0]
    with torch.inference_mode():
        comfy.sd.save_checkpoint(str(tmp_path / "saved.sft"), merged)
    change = load_file(tmp_path / "saved.sft")["model." + MODULATION].float()
    change -= load_file(files["t2v"])[MODULATION.removeprefix("diffusion_model.")].float()
    assert relative(change, 0.5 * lora[1]) < 0.05


def test_another_strength_on_8_bits_loads_nothing_again(files, lora):
    model = host.load_model(files["t2v"], "fp8_e4m3fn")
    weak, strong = (load(model, lora[0], strength)[0] for strength in (0.5, 1.0))
    assert model.patches_uuid == weak.patches_uuid == strong.patches_uuid
    assert not model.patches
    assert weak.patches[KEY][0][0] == 0.5
    assert weak.clone().patches[KEY] == weak.patches[KEY]


def test_a_clone_of_its_own_weights_has_the_lora(files, prompts, sample, lora):
    model = host.load_model(files["t2v"], "fp8_e4m3fn")
    rest = (*prompts, {"samples": torch.zeros(1, 16, 2, 4, 4)})
    patched = load(model, lora[0])[0]
    one = sample(patched, *rest)[0]["samples"]
    with torch.inference_mode():
        other = patched.deepclone_multigpu()
    assert other.model is not patched.model
    assert torch.equal(sample(other, *rest)[0]["samples"], one)


def test_a_chain_is_worked_in_by_its_order(files, lora):
    """Two of one strength are not drawn together past the one between them, which may be a DoRA."""
    model = host.load_model(files["t2v"], "fp8_e4m3fn")
    for strength in (0.7, 0.4, 0.7):
        model = load(model, lora[0], strength)[0]
    key = KEY.removeprefix("diffusion_model.")
    at_use = [x.values for x in _loras_at_use(model) if key in dict(x.patches)]
    assert at_use == [[0.7], [0.4], [0.7]]


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_a_lora_cut_out_and_added_again_acts_whole(files, prompts, lora, dtype):
    """Also on modulation, which the host merges into what it saves and into no model that runs."""
    from comfy_extras.nodes_model_merging import ModelAdd, ModelSubtract

    model = host.load_model(files["t2v"], dtype)
    latent, sigmas = {"samples": torch.zeros(1, 16, 2, 4, 4)}, [1.0, 0.5, 0.0]
    patched = load(model, lora[0])[0]
    added = ModelAdd().merge(model, ModelSubtract().merge(patched, model, 1.0)[0])[0]
    plain, expected, ours = (host_euler(m, *prompts, latent, sigmas, 3.0, 5) for m in (model, patched, added))
    assert relative(ours, expected) < 0.2 * relative(plain, expected)
    assert torch.equal(host_euler(model, *prompts, latent, sigmas, 3.0, 5), plain)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_a_schedule_is_not_lost_in_silence_where_there_is_one_strength(files, lora, tmp_path, dtype):
    from comfy_extras.nodes_lora_extract import LoraSave
    from comfy_extras.nodes_model_merging import ModelMergeSimple, ModelSubtract

    model = host.load_model(files["t2v"], dtype)
    changing = load(model, lora[0], 1.0, "1, 0.5")[0]
    for use in (
        lambda: comfy.sd.save_checkpoint(str(tmp_path / "saved.sft"), changing),
        lambda: ModelMergeSimple().merge(model, changing, 0.5),
        lambda: LoraSave.execute("a", 8, "standard", True, ModelSubtract().merge(changing, model, 1.0)[0]),
    ):
        with pytest.raises(ValueError, match=r"strength_schedule \(1, 0\.5 over the steps\).*one strength"):
            use()
