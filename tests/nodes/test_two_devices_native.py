"""The host's samplers after MultiGPU CFG Split: our MODEL as the native one, and as on one device."""

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider, DualModelGuider
from helpers import relative
from helpers_devices import several_devices, unmapped

SIGMAS = torch.tensor([1.0, 0.7, 0.4, 0.0])


@pytest.fixture
def split(monkeypatch):
    with several_devices(monkeypatch) as split:
        yield split


@pytest.fixture
def pair(files):
    """(ours, the native MODEL)"""
    return unmapped(files["t2v"]), comfy.sd.load_diffusion_model(str(files["t2v"]))


def ksampler(model, positive, negative):
    empty = torch.zeros(1, 16, 2, 4, 6)
    noise = comfy.sample.prepare_noise(empty, 4)
    return comfy.sample.sample(
        model, noise, 3, 4.0, "uni_pc", "simple", positive, negative, empty, seed=4, disable_pbar=True
    )


def guided(make):
    def run(model, positive, negative):
        empty = torch.zeros(1, 16, 2, 4, 6)
        noise = comfy.sample.prepare_noise(empty, 4)
        sampler = comfy.samplers.sampler_object("euler")
        return make(model, positive, negative).sample(
            noise, empty, sampler, SIGMAS, seed=4, disable_pbar=True
        )

    return run


SAMPLERS = {
    "KSampler": ksampler,
    "CFGGuider": guided(lambda m, p, n: CFGGuider.execute(m, p, n, 3.0).result[0]),
    "BasicGuider": guided(lambda m, p, n: BasicGuider.execute(m, p).result[0]),
    "DualCFGGuider": guided(lambda m, p, n: DualCFGGuider.execute(m, p, n, n, 3.0, 2.0, "regular").result[0]),
    "DualModelGuider": guided(lambda m, p, n: DualModelGuider.execute(m, p, 3.0, m, n).result[0]),
}


@pytest.mark.parametrize("run", SAMPLERS.values(), ids=SAMPLERS)
def test_as_native_and_as_on_one_device(pair, prompts, split, run):
    ours, native = pair
    one, expected = (run(model, *prompts) for model in (ours, native))
    two = run(split(ours), *prompts)
    assert torch.equal(two, one)
    assert relative(two, run(split(native), *prompts)) < 2e-5
    assert relative(two, expected) < 2e-5
