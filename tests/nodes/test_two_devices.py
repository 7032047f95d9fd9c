"""The host's MultiGPU CFG Split on our MODEL: each pass on its copy, the bytes of one device, one way out."""

import threading

import comfy.model_management as management
import pytest
import torch
from helpers_devices import several_devices, unmapped
from helpers_nodes import clip_vision
from wan21 import host
from wan21.host.devices import patchers_of
from wan21.wan import attention
from wan21.wan.attention import SDPA
from wan21.wan.refusal import Refusal

BOTH = "devices: cond on cpu, uncond on cpu:0"
TEACACHE = dict(cache__multiplier=2.0, cache__profile="t2v_1.3b", steps=6)
OPTIONS = {
    "plain": {},
    "euler": {"solver": "euler"},
    "cfg-zero": {"cfg_star": True, "cfg_star__zero_init_steps": 1},
    "skip-layer": {"skip_layers__layers": "1", "skip_layers__start_percent": 0},
    "teacache": TEACACHE,
    "nag": {"nag": True},
    "riflex": {"riflex": "on"},
    "apart": {"execution__joint_pass": False},
    "part": {"steps": 4, "step_range__start_at_step": 1, "denoise": 1.0},
    "everything": TEACACHE | {"cfg_star": True, "skip_layers__layers": "0", "nag": True, "solver": "dpm++"},
}


@pytest.fixture
def split(monkeypatch):
    with several_devices(monkeypatch) as split:
        yield split


@pytest.fixture(scope="module")
def models(files):
    with torch.inference_mode():
        return {kind: unmapped(files[kind]) for kind in ("t2v", "i2v")}


@pytest.fixture
def job(models, prompts):
    return (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 2, 4, 6)})


@pytest.fixture
def threads(monkeypatch):
    """Names of passes and whether the main thread computed them."""
    seen = []
    predict = host.sampling.HostDenoiser.predict

    def watch(self, x, timestep, call):
        here = threading.current_thread() is threading.main_thread()
        seen.append((call.pass_names, self.device, here))
        return predict(self, x, timestep, call)

    monkeypatch.setattr(host.sampling.HostDenoiser, "predict", watch)
    return seen


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_two_devices_give_the_bytes_of_one(job, sample, split, threads, options):
    model, *rest = job
    if "step_range__start_at_step" in options:
        rest[-1] = {"samples": torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(2))}
    one, report = sample(model, *rest, **options)
    assert "devices:" not in report and "each pass on its own device" not in report
    assert all(here for _, _, here in threads)
    threads.clear()
    two, report = sample(split(model), *rest, **options)
    assert torch.equal(one["samples"], two["samples"])
    assert BOTH in report and "memory: each pass on its own device; 0." in report
    assert {(names, str(device)) for names, device, _ in threads} == {
        (("cond",), "cpu"),
        (("uncond",), "cpu:0"),
    }
    assert not any(here for _, _, here in threads)


def test_an_image_model_too(models, image_to_video, sample, split):
    positive, negative, latent = image_to_video(clip_vision_start=clip_vision())
    one, two = (
        sample(model, positive, negative, latent)[0]["samples"]
        for model in (models["i2v"], split(models["i2v"]))
    )
    assert torch.equal(one, two)


def test_prompts_of_unequal_length_and_a_batch(models, prompts, sample, split):
    negative = [[torch.cat([prompts[1][0][0]] * 2, dim=1), dict(prompts[1][0][1])]]
    latent = {"samples": torch.zeros(2, 16, 2, 4, 6)}
    one, two = (sample(m, prompts[0], negative, latent)[0] for m in (models["t2v"], split(models["t2v"])))
    assert torch.equal(one["samples"], two["samples"])


def test_a_noise_mask(job, sample, split):
    model, *rest = job
    mask = torch.zeros(1, 1, 4, 6)
    mask[..., :3] = 1
    rest[-1] = {"samples": torch.randn(1, 16, 2, 4, 6), "noise_mask": mask}
    one, two = (sample(m, *rest, denoise=0.6)[0]["samples"] for m in (model, split(model)))
    assert torch.equal(one, two)


def test_one_pass_is_computed_on_one_device_and_that_is_said(job, sample, split, threads):
    model, *rest = job
    one, _ = sample(model, *rest, guidance_scale=1.0)
    two, report = sample(split(model), *rest, guidance_scale=1.0)
    assert torch.equal(one["samples"], two["samples"])
    assert (
        "note: MultiGPU CFG Split: a step has one pass, guidance_scale being 1; computed on cpu, not on cpu:0"
        in report
    )
    assert "devices:" not in report and {str(device) for _, device, _ in threads} == {"cpu"}


def test_what_computes_nothing_is_not_loaded(monkeypatch, job, sample):
    loaded = []
    load = management.load_models_gpu

    def watch(models, *args, **more):
        loaded.append([str(model.load_device) for model in models])
        return load(models, *args, **more)

    monkeypatch.setattr(management, "load_models_gpu", watch)
    model, *rest = job
    with several_devices(monkeypatch, 3) as split:
        three = split(model)
        assert len(patchers_of(three)) == 3
        one, _ = sample(model, *rest)
        two, report = sample(three, *rest)
        sample(three, *rest, guidance_scale=1.0)
    assert torch.equal(one["samples"], two["samples"])
    assert "a step has 2 passes; computed on cpu and cpu:0, not on cpu:1" in report
    assert loaded == [["cpu"], ["cpu", "cpu:0"], ["cpu"]]


def test_a_joint_pass_asked_for_cannot_be(job, sample, split):
    model, *rest = job
    report = sample(split(model), *rest, execution__joint_pass=True)[1]
    assert "note: execution.joint_pass has no effect: MultiGPU CFG Split" in report
    assert "joint_pass" not in sample(split(model), *rest)[1]


def test_compiled_code_stays_on_its_device(job, sample, split, threads):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    model, *rest = job
    torch._dynamo.reset()
    compiled = TorchCompileModel.execute(model, "eager").result[0]
    one, _ = sample(compiled, *rest)
    two, report = sample(split(compiled), *rest)
    torch._dynamo.reset()
    assert torch.equal(one["samples"], two["samples"])
    assert "the MODEL is compiled, and compiled code holds the weights of one device" in report
    assert {str(device) for _, device, _ in threads} == {"cpu"}


@pytest.mark.parametrize("spread", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("low_scale", [0.0, 1.0])
def test_two_experts_each_with_its_own_devices(job, files, sample, split, spread, low_scale):
    model, *rest = job
    low = host.load_model(files["t2v"], "fp16")
    options = TEACACHE | dict(expert_boundary=0.8, low_noise_guidance_scale=low_scale)
    one, _ = sample(model, *rest, model_low_noise=low, **options)
    pair = [split(m) if wanted else m for m, wanted in zip((model, low), spread)]
    two, report = sample(pair[0], *rest, model_low_noise=pair[1], **options)
    assert torch.equal(one["samples"], two["samples"])
    assert report.count(BOTH) == spread[0] + (spread[1] and low_scale != 1)
    assert ("note: low-noise expert: MultiGPU CFG Split: a step has one pass" in report) == (
        spread[1] and low_scale == 1
    )


def test_memory_is_planned_for_the_fullest_device(job, sample, split, monkeypatch):
    model, *rest = job
    usable = {"cpu": 2**40, "cpu:0": 2**20}
    monkeypatch.setattr(host.memory, "usable_bytes", lambda device: usable[str(device)])
    one, report = sample(model, *rest)
    assert "memory: passes together; 0." in report
    two, report = sample(split(model), *rest)
    assert "memory: each pass on its own device, tokens in 4 parts; 0." in report
    assert torch.allclose(one["samples"], two["samples"], rtol=1e-4, atol=1e-5)


def test_attention_is_one_that_every_device_has(job, sample, split, monkeypatch):
    model, *rest = job

    def choose(name, device, *_):
        if name == "flash" and device.index == 0:
            raise Refusal("attention is flash, and it needs compute capability 8.0", "Choose another")
        return SDPA if device.index == 0 else attention.Attention("flash", attention.sdpa)

    monkeypatch.setattr(host.attention, "choose_attention", choose)
    monkeypatch.setattr(host.attention.args, "use_pytorch_cross_attention", False)
    assert "attention: flash" in sample(model, *rest)[1]
    assert "attention:" not in sample(split(model), *rest)[1]
    with pytest.raises(Refusal, match=r"needs compute capability 8\.0"):
        sample(split(model), *rest, execution__attention="flash")


def test_a_nan_in_one_pass_is_blamed_as_ever(job, sample, split):
    model, *rest = job
    two = split(model)
    weight = patchers_of(two)[1].model.diffusion_model.blocks[0].ffn[0].weight
    kept = weight.clone()
    weight[0, 0] = float("nan")
    try:
        with pytest.raises(Refusal, match="step 1 of 3 gave NaN"):
            sample(two, *rest)
    finally:
        weight.copy_(kept)
