"""Memory on the host: what its manager is told, plans when there is little, and what follows when it ends."""

from types import SimpleNamespace

import comfy.model_management
import comfy.sampler_helpers
import pytest
import torch
from wan21 import host
from wan21.host.memory import make_room, usable_bytes
from wan21.host.stored import kept_dtype, weight_bytes
from wan21.wan.memory import MemoryPlan, StepSize, step_bytes


@pytest.fixture
def job(models, prompts):
    return (models["t2v"], *prompts, {"samples": torch.zeros(1, 16, 3, 8, 10)})


@pytest.fixture
def told(monkeypatch):
    """(memory_required, minimum_memory_required) of each load that the host's manager was asked for."""
    asked = []
    load = comfy.model_management.load_models_gpu

    def watch(models, memory_required=0, minimum_memory_required=None, **more):
        asked.append((memory_required, minimum_memory_required))
        return load(models, memory_required, minimum_memory_required=minimum_memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    return asked


@pytest.mark.parametrize("scale, joint, passes", [(1.0, True, 1), (4.0, True, 2), (4.0, False, 2)])
def test_the_manager_is_told_the_bytes_of_our_plan(job, sample, told, scale, joint, passes):
    sample(*job, guidance_scale=scale, execution__joint_pass=joint, steps=1)
    size = StepSize(host.config_of(job[0]), (1, 16, 3, 8, 10), passes, itemsize=4)
    need = step_bytes(size, MemoryPlan(joint))
    assert told == [(need, need)]


def test_the_hosts_own_samplers_are_told_too(job):
    model = job[0].model
    size = StepSize(model.diffusion_model.config, (1, 16, 3, 8, 10), 1, itemsize=4)
    one, two = (comfy.sampler_helpers.estimate_memory(job[0], (1, 16, 3, 8, 10), {})[i] for i in (1, 0))
    assert one == step_bytes(size) and one < two < 2 * one


def test_little_memory_lowers_the_plan_and_no_number(job, sample, monkeypatch):
    plain, report = sample(*job)
    assert "memory: passes together; 0." in report
    free = lambda device=None, torch_free_too=False: (2**20, 0) if torch_free_too else 2**20  # noqa: E731
    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    lowest, report = sample(*job)
    assert "memory: one pass after the other, tokens in 4 parts; 0." in report
    assert torch.allclose(lowest["samples"], plain["samples"], rtol=1e-4, atol=1e-5)


def test_a_model_that_is_gone_holds_no_memory(monkeypatch):
    """The host keeps its entry for a while, and asks the driver about a GPU only."""
    gpu = torch.device("cuda", 0)
    management = comfy.model_management
    there = SimpleNamespace(device=gpu, model=object(), model_loaded_memory=lambda: 2**20)
    gone = SimpleNamespace(device=gpu, model=None, model_loaded_memory=lambda: None.loaded_size())
    monkeypatch.setattr(management, "current_loaded_models", [there, gone])
    monkeypatch.setattr(management, "get_free_memory", lambda device: 2**30)
    assert usable_bytes(gpu) == 2**30 + 2**20 - management.extra_reserved_memory()


class RunsOut:
    """Attention of the host that runs out of memory at the calls named; only self-attention counts."""

    def __init__(self, *calls):
        self.at, self.calls = calls, 0

    def __call__(self, function, q, k, *args, **kwargs):
        itself = q.shape == k.shape
        self.calls += itself
        if itself and self.calls in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return function(q, k, *args, **kwargs)


def with_attention(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


OPTIONS = [
    {},
    dict(
        cache__multiplier=2.0,
        cache__profile="t2v_1.3b",
        steps=6,
        skip_layers__layers="1",
        skip_layers__start_percent=50,
    ),
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "teacache"])
def test_running_out_goes_on_from_the_same_step(job, sample, options):
    model, *rest = job
    options = {"steps": 4, "solver": "unipc"} | options
    undisturbed = RunsOut()
    plain, _ = sample(with_attention(model, undisturbed), *rest, **options)
    disturbed = RunsOut(4 + 3)  # two blocks, two passes: the third call of the second computed step
    ours, report = sample(with_attention(model, disturbed), *rest, **options)
    assert torch.allclose(ours["samples"], plain["samples"], rtol=1e-4, atol=1e-5)
    assert report.count("note: out of memory in step") == 1
    assert "which was done again; from there on: passes together, tokens in 4 parts" in report
    assert disturbed.calls == undisturbed.calls + 3  # nothing before that step was done twice


def test_running_out_for_good_is_an_error_that_says_what_to_do(job, sample):
    model, *rest = job
    always = RunsOut(*range(100))
    with pytest.raises(torch.OutOfMemoryError, match=r"plan of least memory .*Set fewer frames"):
        sample(with_attention(model, always), *rest)
    assert always.calls == 3  # each plan once


def test_a_host_that_loads_weights_at_their_use(files, monkeypatch):
    """The dtypes and bytes are those a weight is going to have; half-loaded layers are cleaned up."""
    model = host.load_model(files["t2v"], "fp8_e4m3fn")
    plain = weight_bytes(model)
    layer = model.model.diffusion_model.blocks[0].ffn[0]
    assert plain == model.model_size() and kept_dtype(layer, "weight") == torch.float8_e4m3fn
    for module in model.model.modules():  # as in the file until they are used
        for name, value in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(value.half(), requires_grad=False))
    monkeypatch.setattr(model, "is_dynamic", lambda: True)
    schedule = sum(buffer.nbytes for buffer in model.model.model_sampling.buffers())
    assert weight_bytes(model) == plain - schedule and kept_dtype(layer, "weight") == torch.float8_e4m3fn
    layer._prefetch = {"signature": None}
    make_room(model)
    assert not hasattr(layer, "_prefetch")


@pytest.mark.parametrize("dynamic, asked", [(False, 2**30), (True, 3 * 2**20)])
def test_room_is_made_of_what_can_be_brought_back(files, monkeypatch, dynamic, asked):
    """Asked for more than is in its pages, a host with dynamic memory also gives up what it has merged."""
    model, freed = host.load_model(files["t2v"]), []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *args, **more: [])
    monkeypatch.setattr(model, "is_dynamic", lambda: dynamic)
    monkeypatch.setattr(model, "loaded_size", lambda: 4 * 2**20)
    monkeypatch.setattr(model, "load_device", torch.device("cuda", 0))
    monkeypatch.setattr(model.model, "model_loaded_weight_memory", 2**20)
    monkeypatch.setattr(model, "partially_unload", lambda device, amount: freed.append(amount) or amount)
    assert make_room(model)
    assert freed == [asked]


@pytest.mark.parametrize("room", [1.2, 1.6, 9])
def test_the_first_experts_memory_is_given_back_when_the_second_begins(
    files, prompts, sample, monkeypatch, room
):
    """On the pretended GPU, by how many of them it has room for; where both fit, both stay."""
    pytest.importorskip("pretended_cuda")
    management = comfy.model_management
    high, low = host.load_model(files["t2v"]), host.load_model(files["t2v"])
    whole, seen = high.model_size(), []

    def free(device=None, torch_free_too=False):
        held = sum(m.model_loaded_memory() for m in management.current_loaded_models if m.device == device)
        left = management.minimum_inference_memory() + room * whole - held
        return (left, 0) if torch_free_too else left

    def look(*_):
        seen.append(tuple(model.loaded_size() / whole for model in (high, low)))

    job = dict(model_low_noise=low, steps=4, flow_shift=5.0)
    latent = {"samples": torch.zeros(1, 16, 3, 8, 10)}
    plain, _ = sample(high, *prompts, latent, **job)
    management.unload_all_models()
    monkeypatch.setattr(management, "get_free_memory", free)
    for model in (high, low):
        model.model.diffusion_model.blocks[0].register_forward_pre_hook(look)
    tight, _ = sample(high, *prompts, latent, **job)
    begun, after = dict.fromkeys(seen)
    assert begun == (1, 0) and after[1] == 1
    assert after[0] == 1 if room > 2 else after[0] <= room - 1
    assert torch.allclose(tight["samples"], plain["samples"], rtol=1e-4, atol=1e-5)
