"""LoRAs on every copy of the host's MultiGPU CFG Split: in its own samplers and in ours, the bytes of one."""

import comfy.sample
import pytest
import torch
from comfy_extras.nodes_custom_sampler import DualModelGuider
from helpers import relative
from helpers_devices import several_devices, unmapped
from helpers_nodes import host_euler
from safetensors.torch import save_file
from test_gguf import pair  # noqa: F401 (fixture)
from test_lora import first_lora, load, loras, low_rank, second_lora  # noqa: F401 (fixtures)
from wan21.host.devices import patchers_of

from nodes import LoraLoaderModelOnly

LATENT = {"samples": torch.zeros(1, 16, 2, 4, 4)}
SIGMAS = [1.0, 0.7, 0.4, 0.0]
MODULATION = {"diffusion_model.blocks.1.diff_m": torch.randn(1, 6, 256) / 4}
FILES = {
    "layers": low_rank("diffusion_model.blocks.0.self_attn.q"),
    "modulation": MODULATION,
    "all": first_lora(),
    "dora": second_lora(),
}


@pytest.fixture
def split(monkeypatch):
    with several_devices(monkeypatch) as split:
        yield split


@pytest.fixture
def lora(loras):  # noqa: F811
    for name, file in FILES.items():
        save_file(file, loras / f"{name}.safetensors")
    return lambda model, name, *args: load(model, f"{name}.safetensors", *args)[0]


@pytest.fixture
def hosts(prompts):
    """The host's Euler with guidance, over a MODEL."""
    return lambda model: host_euler(model, *prompts, LATENT, SIGMAS, 3.0, 5)


@pytest.fixture
def ours(prompts, sample):
    """Our sampler over a MODEL."""

    def run(model):
        samples, report = sample(model, *prompts, LATENT)
        assert ("devices: cond on cpu, uncond on cpu:0" in report) == (len(patchers_of(model)) > 1)
        return samples["samples"]

    return run


def check(run, plain, patched, split):
    """The LoRA acts, on two devices as on one, also where it was put on after the split; nothing stays."""
    without, one = run(plain), run(patched)
    assert relative(one, without) > 1e-4
    two = split(patched)
    assert torch.equal(run(two), one)
    assert torch.equal(run(two), one)
    assert torch.equal(run(split(plain)), without)
    assert torch.equal(run(plain), without)


@pytest.mark.parametrize("sampler", ["hosts", "ours"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("dtype", ["default", "fp8_e4m3fn"])
@pytest.mark.parametrize("schedule", ["", "1, 0.2, 1"])
def test_loras_act_on_every_copy(files, lora, split, request, sampler, name, dtype, schedule):
    model = unmapped(files["t2v"], dtype)
    check(request.getfixturevalue(sampler), model, lora(model, name, 0.8, schedule), split)


@pytest.mark.parametrize("sampler", ["hosts", "ours"])
@pytest.mark.parametrize("dtype, schedule", [("default", "1, 0.2"), ("fp8_e4m3fn", "")])
def test_put_on_after_the_split(files, lora, split, request, sampler, dtype, schedule):
    run, model = request.getfixturevalue(sampler), unmapped(files["t2v"], dtype)
    one = run(lora(model, "all", 1.0, schedule))
    assert torch.equal(run(lora(split(model), "all", 1.0, schedule)), one)


@pytest.mark.parametrize("sampler", ["hosts", "ours"])
def test_two_loras_and_one_of_the_hosts(files, lora, split, request, sampler):
    run, model = request.getfixturevalue(sampler), unmapped(files["t2v"], "fp8_e4m3fn")
    patched = lora(lora(model, "all", 0.5), "dora", 1.0, "0, 1")
    patched = LoraLoaderModelOnly().load_lora_model_only(patched, "layers.safetensors", 0.7)[0]
    check(run, model, patched, split)


@pytest.mark.parametrize("sampler", ["hosts", "ours"])
@pytest.mark.parametrize("schedule", ["", "1, 0.2, 1"])
def test_packed_weights(pair, lora, split, request, sampler, schedule):  # noqa: F811
    model = unmapped(pair[0])
    check(request.getfixturevalue(sampler), model, lora(model, "layers", 1.0, schedule), split)


def test_a_second_model_of_a_guider(files, lora, split, prompts):
    """The host computes the first MODEL of a DualModelGuider on its copies, the second on one device."""
    first, second = (unmapped(files["t2v"], "fp8_e4m3fn") for _ in range(2))
    a, b = lora(first, "all", 1.0), lora(second, "layers", 1.0, "1, 0.2")
    noise = comfy.sample.prepare_noise(LATENT["samples"], 4)

    def dual(one, other):
        guider = DualModelGuider.execute(one, prompts[0], 3.0, other, prompts[1]).result[0]
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, LATENT["samples"], sampler, torch.tensor(SIGMAS), seed=4)

    alone = dual(a, b)
    assert torch.equal(dual(split(a), b), alone)
    assert torch.equal(dual(split(a), split(b)), alone)
    assert relative(dual(first, second), alone) > 1e-3
