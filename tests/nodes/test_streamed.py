"""How often streamed weights are fetched (docs/memory.md). Runs on the pretended GPU alone."""

from dataclasses import replace

import comfy.model_management
import comfy.model_prefetch
import comfy.ops
import pytest
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from helpers import relative
from wan21 import host
from wan21.host import prefetch, runner
from wan21.host.stored import weight_bytes
from wan21.wan.memory import GIB, MemoryPlan

pretended_aimdo = pytest.importorskip("pretended_aimdo")
FFN = "diffusion_model.blocks.0.ffn.0"


@pytest.fixture
def fetched(monkeypatch):
    """Bytes that were fetched, of a layer or a block at a time; nothing stays on the device."""
    monkeypatch.setattr(pretended_aimdo, "RESIDENT", 0)
    fetch, seen = comfy.ops.cast_modules_with_vbar, []

    def counted(layers, *how):
        seen.append(sum(t.nbytes for layer in layers for t in (layer.weight, layer.bias) if t is not None))
        return fetch(layers, *how)

    monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", counted)
    return seen


@pytest.fixture
def model(files):
    loaded = host.load_model(files["t2v"])
    assert loaded.is_dynamic()
    return loaded


@pytest.fixture
def job(prompts):
    return *prompts, {"samples": torch.zeros(1, 16, 3, 8, 8)}


def block_bytes(model):
    """Of the layers; a block's modulation is none."""
    blocks = model.model.diffusion_model.blocks
    return sum(value.nbytes for name, value in blocks.named_parameters() if "modulation" not in name)


def by_plan(monkeypatch, plan):
    monkeypatch.setattr("wan21.nodes.sampler.plans_from", lambda *_: (plan,))


def of_one_block(model):
    return block_bytes(model) // len(model.model.diffusion_model.blocks)


def streamed_bytes(model):
    """Of the layers of a block that the host brings; its norms are small, and are there from the start."""
    layers = prefetch.layers_of(model.model.diffusion_model.blocks[0])
    return sum(t.nbytes for layer in layers for t in (layer.weight, layer.bias) if t is not None)


STEPS = 3


@pytest.mark.parametrize("guidance, joint, walks", [(1.0, True, 1), (4.0, True, 1), (4.0, False, 2)])
@pytest.mark.parametrize("parts", [1, 4])
def test_a_block_is_fetched_once_a_step(
    model, job, sample, fetched, monkeypatch, guidance, joint, walks, parts
):
    """For all passes that go together, and all parts of the tokens."""
    by_plan(monkeypatch, MemoryPlan(joint, parts))
    fetched.clear()
    sample(model, *job, steps=STEPS, guidance_scale=guidance)
    blocks = len(model.model.diffusion_model.blocks)
    assert fetched.count(streamed_bytes(model)) == STEPS * walks * blocks
    assert 0.99 * of_one_block(model) < streamed_bytes(model)
    outside = sum(p.nbytes for p in model.model.diffusion_model.parameters()) - block_bytes(model)
    passes = 1 if guidance == 1.0 else 2
    assert sum(fetched) - STEPS * walks * block_bytes(model) <= STEPS * passes * outside


@pytest.mark.parametrize("parts", [1, 4])
def test_by_the_least_plan_a_layer_is_fetched_at_each_call(model, job, sample, fetched, monkeypatch, parts):
    """So does a host without the queue."""
    by_plan(monkeypatch, MemoryPlan(True, parts))
    fetched.clear()
    ahead, report = sample(model, *job, steps=1)
    once = sum(fetched)
    assert "layer by layer" not in report
    by_plan(monkeypatch, MemoryPlan(True, parts, ahead=False))
    fetched.clear()
    apart, report = sample(model, *job, steps=1)
    assert "weights fetched layer by layer" in report
    assert sum(fetched) - once == pytest.approx((2 * parts - 1) * block_bytes(model), rel=0.02)
    assert torch.equal(ahead["samples"], apart["samples"])
    if parts == 1:
        by_plan(monkeypatch, MemoryPlan())
        monkeypatch.setattr(prefetch, "model_prefetch", None)
        assert prefetch.ahead_bytes(model) == 0
        fetched.clear()
        without, _ = sample(model, *job, steps=1)
        assert sum(fetched) - once == pytest.approx(block_bytes(model), rel=0.02)
        assert torch.equal(ahead["samples"], without["samples"])


def with_lora(model, key=FFN):
    """A LoRA of the host's loaders, which is worked in by the host, on a matrix and its bias."""
    model, g = model.clone(), torch.Generator().manual_seed(3)
    rows, columns = model.get_model_object(key).weight.shape
    up, down = torch.randn(rows, 4, generator=g), torch.randn(4, columns, generator=g)
    adapter = LoRAAdapter(set(), (up, down, None, None, None, None))
    model.add_patches({f"{key}.weight": adapter, f"{key}.bias": ("diff", (up[:, 0],))}, 0.05)
    return model


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_lora_of_the_host_is_worked_in_once_a_pass(
    files, job, sample, fetched, monkeypatch, tmp_path, stored
):
    """The host adds it to the fetched numbers in place where they need no cast."""
    from safetensors.torch import load_file, save_file

    path = tmp_path / "stored.safetensors"
    state = {key: value.to(stored) for key, value in load_file(files["t2v"]).items()}
    save_file(state, path, metadata={"config": '{"transformer": {"text_dim": 128}}'})
    plain = host.load_model(path)
    model, found = with_lora(plain), []
    for ahead in (False, True):
        by_plan(monkeypatch, MemoryPlan(True, 4, ahead=ahead))
        fetched.clear()
        found.append(sample(model, *job, steps=1)[0]["samples"])
    assert max(fetched) == streamed_bytes(model)
    assert torch.equal(*found)
    assert relative(sample(plain, *job, steps=1)[0]["samples"], found[0]) > 0.01


def test_a_patch_of_another_kind_is_left_to_its_layer(model, job, sample, fetched, monkeypatch):
    class Another(prefetch.LowVramPatch):
        pass

    sample(with_lora(model), *job, steps=1)
    layer = model.get_model_object(FFN)
    layer.weight_lowvram_function.__class__ = Another
    block = model.model.diffusion_model.blocks[0]
    assert [one for one in block.modules() if hasattr(one, "_v") and one is not layer] == prefetch.layers_of(
        block
    )


@pytest.fixture
def nothing_left(model):
    """Nothing that was fetched stays with a layer, and the host keeps no queue of ours."""
    queues = len(comfy.model_prefetch.PREFETCH_QUEUES)
    yield
    assert not [layer for layer in model.model.modules() if hasattr(layer, "_prefetch")]
    assert len(comfy.model_prefetch.PREFETCH_QUEUES) == queues


@pytest.mark.usefixtures("nothing_left", "fetched")
@pytest.mark.parametrize("at", [1, 3])
def test_a_cancelled_walk_lets_go(model, job, sample, monkeypatch, at):
    asked = []

    def cancelled():
        asked.append([layer for layer in model.model.modules() if hasattr(layer, "_prefetch")])
        if len(asked) > at:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(runner, "check_cancelled", cancelled)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, *job, steps=1)
    assert asked[-1]


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("at", ["fetch", "block"])
def test_out_of_memory_lets_go_and_the_step_is_done_again(model, job, sample, fetched, monkeypatch, at):
    """In the middle of a fetch, of which half a block is there already; and in a block."""
    expected, _ = sample(model, *job, steps=1)
    fetch, failed = comfy.ops.cast_modules_with_vbar, []

    def short(layers, *how):
        if len(layers) > 1 and not failed:
            fetch(layers[: len(layers) // 2], *how)
            failed.append(at)
            raise torch.OutOfMemoryError("none left")
        return fetch(layers, *how)

    forward = type(model.model.diffusion_model.blocks[1]).forward

    def fails(block, *inputs, **how):
        if not failed and block is model.model.diffusion_model.blocks[1]:
            failed.append(at)
            raise torch.OutOfMemoryError("none left")
        return forward(block, *inputs, **how)

    if at == "fetch":
        monkeypatch.setattr(comfy.ops, "cast_modules_with_vbar", short)
    else:
        monkeypatch.setattr(type(model.model.diffusion_model.blocks[1]), "forward", fails)
    found, report = sample(model, *job, steps=1)
    assert failed and "out of memory in step 1, which was done again" in report
    assert relative(found["samples"], expected["samples"]) < 1e-5


@pytest.mark.usefixtures("fetched")
def test_two_blocks_are_counted_where_weights_are_streamed(model, job, sample, monkeypatch):
    """Where they do not fit beside the least step, weights come layer by layer."""
    ahead = prefetch.ahead_bytes(model)
    assert ahead == 2 * of_one_block(model)
    plans = (MemoryPlan(),)
    usable = {"is": 1e15}
    monkeypatch.setattr(host.memory, "usable_bytes", lambda device: usable["is"])

    def planned():
        return host.plan_memory(model, (1, 16, 3, 8, 8), plans, 2)

    _, step, said = planned()
    assert ", resident" in said and "layer by layer" not in said
    usable["is"] = (step + ahead + 1) / 0.9
    (first, *_), need, said = planned()
    assert first.ahead and need == step + ahead
    assert f"{need / GIB:.2f} GiB estimated" in said and "streamed in part" in said
    usable["is"] = (step + ahead - 1) / 0.9
    (first, *others), need, said = planned()
    assert first == replace(plans[0], ahead=False) and not others and need == step
    assert said.startswith("passes together, weights fetched layer by layer; ")


@pytest.mark.usefixtures("fetched")
def test_the_hosts_samplers_are_told_of_these_blocks_only_where_weights_are_streamed(model, monkeypatch):
    monkeypatch.setattr(model.model, "current_patcher", model)
    weights, shape = weight_bytes(model), (1, 16, 3, 8, 8)
    monkeypatch.setattr(prefetch, "usable_bytes", lambda device: 1e15)
    step = model.model.memory_required(shape)
    for usable, ahead in ((step + weights, 0), (step + weights - 1, 2 * of_one_block(model))):
        monkeypatch.setattr(prefetch, "usable_bytes", lambda device, usable=usable: usable)
        assert model.model.memory_required(shape) == step + ahead
