"""An option that reads the negative text gets it from the node to the block, though no pass runs on it."""

from dataclasses import dataclass, replace

import pytest
import torch
from comfy_extras.nodes_torch_compile import TorchCompileModel
from wan21.nodes import sampler
from wan21.wan.dit import attend_text
from wan21.wan.option import Option


@dataclass(frozen=True)
class ReadsTheNegative(Option):
    """The conditional pass attends to the negative text in place of its own."""

    needs_negative = True

    def begin(self, run, embed_time, record):
        def context_attention(p, texts):
            return lambda cross, q, text, attention: attend_text(cross, q, texts["uncond"], attention)

        return lambda call: replace(call, context_attention=context_attention)


@pytest.fixture
def reading(monkeypatch):
    monkeypatch.setattr(sampler, "options_of", lambda *_, **more: (ReadsTheNegative(),))


@pytest.fixture
def plain(models, prompts, sample):
    """A run at guidance 1 whose positive prompt is the negative one."""
    return lambda latent: sample(models["t2v"], prompts[1], prompts[1], latent, guidance_scale=1.0)[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_the_negative_reaches_cross_attention(models, prompts, sample, plain, batch, request):
    latent = {"samples": torch.zeros(batch, 16, 2, 4, 6)}
    expected = plain(latent)["samples"]
    request.getfixturevalue("reading")
    ours, report = sample(models["t2v"], *prompts, latent, guidance_scale=1.0)
    assert torch.equal(ours["samples"], expected) and "passes: 3 cond\n" in report


def test_in_compiled_blocks(models, prompts, sample, plain, request):
    torch._dynamo.reset()
    latent = {"samples": torch.zeros(1, 16, 2, 4, 6)}
    expected = plain(latent)["samples"]
    request.getfixturevalue("reading")
    try:
        compiled = TorchCompileModel.execute(models["t2v"], "eager").result[0]
        ours, _ = sample(compiled, *prompts, latent, guidance_scale=1.0)
    finally:
        torch._dynamo.reset()
    assert torch.equal(ours["samples"], expected)


def test_a_negative_that_is_read_is_checked(models, prompts, sample, reading):
    other = [[torch.zeros(1, 512, 4096), {}]]
    with pytest.raises(ValueError, match=r"^Wan21Sampler: negative has text features 4096 wide"):
        sample(models["t2v"], prompts[0], other, {"samples": torch.zeros(1, 16, 2, 4, 6)}, guidance_scale=1.0)
