"""LoRAs on a MODEL that another's run takes along: the host's DualModelGuider."""

import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DualModelGuider
from helpers import relative
from safetensors.torch import load_file, save_file
from test_lora import load, loras, low_rank  # noqa: F401 (fixtures)
from wan21 import host

QUERY = "diffusion_model.blocks.0.self_attn.q"


@pytest.fixture
def lora(loras):  # noqa: F811
    change = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(7)) / 16
    save_file(low_rank(QUERY) | {"diffusion_model.blocks.1.diff_m": change}, loras / "a.safetensors")
    return "a.safetensors"


def dual(first, second, prompts):
    """The positive prompt on the first MODEL, the negative one on the second."""
    guider = DualModelGuider.execute(first, prompts[0], 3.0, second, prompts[1]).result[0]
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    sampler, sigmas = comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.5, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=1)


@pytest.mark.parametrize("strengths", [(0, 1.0), (1.0, 0), (0.4, -0.8)])
def test_the_second_model_has_its_lora_in_8_bits_as_in_16(files, prompts, lora, strengths):
    effects = []
    for dtype in ("bf16", "fp8_e4m3fn"):
        pair = [host.load_model(files["t2v"], dtype) for _ in strengths]
        plain = dual(*pair, prompts)
        changed = dual(*(load(m, lora, s)[0] for m, s in zip(pair, strengths)), prompts)
        assert torch.equal(dual(*pair, prompts), plain)  # nothing stays
        effects.append(changed - plain)
    assert effects[0].norm() > 0 and relative(effects[1], effects[0]) < 0.25


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_two_models_over_one_have_the_loras_of_the_first(files, prompts, lora, dtype):
    """As with the host's merged weights: the model below both holds what was loaded last, the first's."""
    model = host.load_model(files["t2v"], dtype)
    weak, strong = (load(model, lora, s)[0] for s in (0.5, 1.0))
    plain, both = dual(model, model, prompts), dual(strong, strong, prompts)
    assert relative(both, plain) > 1e-3
    assert torch.equal(dual(model, strong, prompts), plain)
    assert torch.equal(dual(strong, model, prompts), both)
    assert torch.equal(dual(strong, weak, prompts), both)


@pytest.mark.parametrize("dtype", ["bf16", "fp8_e4m3fn"])
def test_a_schedule_acts_on_the_second_model(files, prompts, lora, dtype):
    first, second = (host.load_model(files["t2v"], dtype) for _ in range(2))
    constant, scheduled = load(second, lora)[0], load(second, lora, schedule="1, 1.0001")[0]
    plain, expected = dual(first, second, prompts), dual(first, constant, prompts)
    effect = dual(first, scheduled, prompts) - plain
    assert relative(effect, expected - plain) < 0.05
    off = load(second, lora, schedule="0, 1")[0]
    assert relative(dual(first, off, prompts) - plain, expected - plain) > 0.1


def test_a_replaced_part_of_the_second_model_is_refused(files, prompts):
    first, second = (host.load_model(files["t2v"]) for _ in range(2))
    # A function as packs set it: a module in a method's place the host could not take back.
    second.add_object_patch("diffusion_model.forward_orig", lambda x, *args, **kwargs: x)
    with pytest.raises(ValueError, match=r"replaced diffusion_model\.forward_orig"):
        dual(first, second, prompts)


@pytest.mark.parametrize("native_first", [True, False])
def test_a_schedule_on_modulation_alone_acts_beside_a_native_model(files, prompts, loras, native_first):  # noqa: F811
    change = torch.randn(1, 6, 256, generator=torch.Generator().manual_seed(7)) / 4
    save_file({"diffusion_model.blocks.1.diff_m": change}, loras / "m.safetensors")
    native, ours = comfy.sd.load_diffusion_model(str(files["t2v"])), host.load_model(files["t2v"])

    def run(model):
        return dual(*((native, model) if native_first else (model, native)), prompts)

    plain = run(ours)
    expected = run(load(ours, "m.safetensors")[0]) - plain
    effect = run(load(ours, "m.safetensors", schedule="1, 1.0001")[0]) - plain
    assert expected.norm() > 0 and relative(effect, expected) < 0.01
    assert torch.equal(run(ours), plain)  # nothing stays


def test_two_native_models_over_one_have_the_loras_of_the_first(files, prompts, lora):
    """Also where the first has none of ours, and so none of our callbacks."""
    native = comfy.sd.load_diffusion_model(str(files["t2v"]))
    scheduled = load(native, lora, schedule="1, 0.9")[0]
    plain, changed = dual(native, native, prompts), dual(scheduled, scheduled, prompts)
    assert relative(changed, plain) > 1e-3
    assert torch.equal(dual(native, scheduled, prompts), plain)
    assert torch.equal(dual(scheduled, native, prompts), changed)


@pytest.mark.parametrize("schedule", ["", "1, 0.9"])
@pytest.mark.parametrize("native", [True, False])
def test_the_hosts_lora_and_ours_over_one_model(files, prompts, lora, loras, native, schedule):  # noqa: F811
    """Both MODELs have the first's, whoever loaded it."""
    read = comfy.sd.load_diffusion_model if native else host.load_model
    model = read(str(files["t2v"]))
    theirs = comfy.sd.load_lora_for_models(model, None, load_file(loras / lora), 0.7, 0)[0]
    ours = load(model, lora, -0.5, schedule)[0]
    plain, of_theirs, of_ours = (dual(m, m, prompts) for m in (model, theirs, ours))
    assert min(relative(of_theirs, plain), relative(of_ours, plain), relative(of_ours, of_theirs)) > 1e-3
    assert torch.equal(dual(theirs, ours, prompts), of_theirs)
    assert torch.equal(dual(ours, theirs, prompts), of_ours)
    assert torch.equal(dual(model, model, prompts), plain)  # nothing stays
