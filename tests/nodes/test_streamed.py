"""How often streamed weights are fetched (docs/memory.md). Runs on the pretended GPU alone."""

import comfy.model_prefetch
import comfy.ops
import pytest
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from helpers import relative
from wan21 import host
from wan21.wan.memory import MemoryPlan

pretended_aimdo = pytest.importorskip("pretended_aimdo")
FFN = "diffusion_model.blocks.0.ffn.0"


@pytest.fixture
def fetched(monkeypatch):
    """Bytes of the layers fetched, each at each time; nothing stays on the device."""
    monkeypatch.setattr(pretended_aimdo, "RESIDENT", 0)
    fetch, seen = comfy.ops.cast_modules_with_vbar, []

    def counted(layers, *how):
        seen.extend(t.nbytes for layer in layers for t in (layer.weight, layer.bias) if t is not None)
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


@pytest.mark.parametrize("guidance, passes", [(1.0, 1), (4.0, 2)])
@pytest.mark.parametrize("joint", [True, False])
def test_a_layer_is_fetched_once_a_pass(model, job, sample, fetched, guidance, passes, joint):
    fetched.clear()
    sample(model, *job, steps=1, guidance_scale=guidance, execution__joint_pass=joint)
    once = sum(fetched) / passes
    outside = sum(p.nbytes for p in model.model.diffusion_model.parameters()) - block_bytes(model)
    assert block_bytes(model) < once < block_bytes(model) + outside


def test_a_layer_of_the_blocks_is_fetched_once_a_part(model, job, sample, fetched, monkeypatch):
    sums = []
    for parts in (1, 4):
        plans = (MemoryPlan(True, parts),)
        monkeypatch.setattr("wan21.nodes.sampler.plans_from", lambda *_, plans=plans: plans)
        fetched.clear()
        sample(model, *job, steps=1)
        sums.append(sum(fetched))
    assert sums[1] - sums[0] == pytest.approx(2 * 3 * block_bytes(model), rel=0.02)


def through_the_hosts_queue(real, blocks):
    """`composed_runner` with each block fetched whole, for all passes, by the host's prefetch queue."""

    def composed(call, options):
        inner = real(call, options)

        def run(count, passes, apply_block):
            device, before = passes[0].x.device, []
            queue = comfy.model_prefetch.make_prefetch_queue(
                list(blocks), device, {"prefetch_dynamic_vbars": True}
            )

            def apply(i, p):
                if i not in before:
                    comfy.model_prefetch.prefetch_queue_pop(queue, device, None)
                    before.append(i)
                return apply_block(i, p)

            inner(count, passes, apply)
            comfy.model_prefetch.prefetch_queue_pop(queue, device, None)

        return run

    return composed


@pytest.mark.parametrize("lora", [False, True])
def test_why_the_hosts_queue_does_not_fetch_blocks(model, job, sample, fetched, monkeypatch, lora):
    """It halves the transfer, and expects one call a layer: a LoRA is added to the fetched copy in place."""
    from wan21.host import model as host_model

    if lora:
        g = torch.Generator().manual_seed(3)
        rows, columns = model.get_model_object(FFN).weight.shape
        factors = torch.randn(rows, 4, generator=g), torch.randn(4, columns, generator=g)
        model.add_patches({f"{FFN}.weight": LoRAAdapter(set(), (*factors, None, None, None, None))}, 0.05)
    fetched.clear()
    expected, _ = sample(model, *job, steps=1)
    plain = sum(fetched)
    blocks = model.model.diffusion_model.blocks
    queued = through_the_hosts_queue(host_model.composed_runner, blocks)
    monkeypatch.setattr(host_model, "composed_runner", queued)
    fetched.clear()
    found, _ = sample(model, *job, steps=1)
    assert plain - sum(fetched) == pytest.approx(block_bytes(model), rel=0.02)
    error = relative(found["samples"], expected["samples"])
    assert error > 0.01 if lora else error == 0
