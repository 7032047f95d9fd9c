"""The host's TorchCompileModel on our MODEL: what is compiled, how often, and that options stay in force.

Backend `eager` captures and guards like every other one and generates no code, which is what is counted here.
"""

import shutil

import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from helpers import relative
from torch._dynamo.utils import counters
from wan21 import host

TEACACHE = dict(cache__multiplier=2.0, cache__profile="t2v_1.3b")


@pytest.fixture
def compiled(models):
    torch._dynamo.reset()
    yield TorchCompileModel.execute(models["t2v"], "eager").result[0]
    torch._dynamo.reset()


@pytest.fixture
def steps(monkeypatch):
    """After each step of a run: (graphs compiled so far, graph breaks so far)."""
    seen = []
    count = host.StepProgress.__call__

    def watch(self, i, x0):
        seen.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
        count(self, i, x0)

    monkeypatch.setattr(host.StepProgress, "__call__", watch)
    return seen


def test_no_recompilation_after_the_second_step_and_no_graph_break(models, compiled, prompts, sample, steps):
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    counters.clear()
    options = [
        {},
        TEACACHE,
        {"skip_layers__layers": "1"},
        TEACACHE | {"skip_layers__layers": "1", "cfg_star": True},
    ]
    for inputs in options:
        plain, _ = sample(models["t2v"], *prompts, latent, **({"steps": 6} | inputs))
        steps.clear()
        ours, report = sample(compiled, *prompts, latent, **({"steps": 6} | inputs))
        assert torch.equal(ours["samples"], plain["samples"]), inputs
        assert ("teacache: 3 of 6" in report or "teacache: 4 of 6" in report) == (
            "cache__multiplier" in inputs
        )
        assert len(set(steps[1:])) == 1, f"compiled again after the second step: {steps}"
        if inputs:
            assert len(set(steps)) == 1, f"an option had the model compiled again: {steps}"
    graphs, breaks = steps[-1]
    assert breaks == 0
    assert 3 <= graphs <= 8  # embeddings, one block for all of them, head and their small change


def test_walking_alone_and_another_size(models, compiled, prompts, sample):
    """What is baked into a graph is not the pass, the step or the size."""
    for shape, joint in (((1, 16, 2, 4, 6), True), ((1, 16, 2, 4, 6), False), ((1, 16, 3, 6, 4), True)):
        latent = {"samples": torch.zeros(shape)}
        options = dict(
            steps=3, execution__joint_pass=joint, skip_layers__layers="0", skip_layers__start_percent=0
        )
        plain, compiled_out = (sample(m, *prompts, latent, **options)[0] for m in (models["t2v"], compiled))
        assert torch.equal(plain["samples"], compiled_out["samples"])


def test_tokens_in_parts(models, compiled, prompts, sample, steps, monkeypatch):
    """The block in parts, as when memory is short, is compiled as the whole one is."""
    free = lambda device=None, torch_free_too=False: (2**20, 0) if torch_free_too else 2**20  # noqa: E731
    monkeypatch.setattr(host.memory.comfy.model_management, "get_free_memory", free)
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    plain, report = sample(models["t2v"], *prompts, latent, steps=6)
    assert "tokens in 4 parts" in report
    counters.clear()
    steps.clear()
    ours, _ = sample(compiled, *prompts, latent, steps=6)
    assert torch.equal(ours["samples"], plain["samples"])
    graphs, breaks = steps[-1]
    assert len(set(steps[1:])) == 1 and breaks == 0 and 3 <= graphs <= 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tolerance is for float32 on the CPU")
@pytest.mark.skipif(
    not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU: g++ is not there"
)
def test_inductor_itself_compiles_the_model(models, prompts, sample):
    """Generated code in place of PyTorch's kernels: the same video up to rounding, options included."""
    torch._dynamo.reset()
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    options = TEACACHE | {"steps": 6, "skip_layers__layers": "1", "cfg_star": True}
    try:
        compiled = TorchCompileModel.execute(models["t2v"], "inductor").result[0]
        plain, ours = (
            sample(m, *prompts, latent, **options)[0]["samples"] for m in (models["t2v"], compiled)
        )
    finally:
        torch._dynamo.reset()
    assert not torch.equal(ours, plain)  # or it did not run
    assert relative(ours, plain) < 1e-4
