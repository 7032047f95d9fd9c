"""Skip-layer guidance: which blocks of which pass are left out, in which steps."""

import pytest
import torch
from wan21.wan.config import WanConfig
from wan21.wan.dit import WanModel, run_blocks
from wan21.wan.skip_layer import is_skipped_at, parse_layers, skip_layers

CONFIG = WanConfig(in_dim=16, dim=128, ffn_dim=64, num_heads=1, num_layers=3, text_dim=8)


@pytest.fixture(scope="module")
def model():
    g = torch.Generator().manual_seed(0)
    model = WanModel(CONFIG, torch.nn).eval()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) / max(1, p[0].numel()) ** 0.5
    return model


@pytest.fixture
def velocities(model):
    """`run(model, runner)` -> velocities of (cond, uncond)."""
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 2, 4, 4, generator=g), torch.randn(2, 5, 8, generator=g)

    def run(model, runner=run_blocks):
        with torch.inference_mode():
            return model(x, torch.tensor([500.0] * 2), text, pass_names=("cond", "uncond"), runner=runner)

    return run


def test_the_unconditional_pass_leaves_the_blocks_out(model, velocities):
    ours = velocities(model, skip_layers((1,))(run_blocks))
    shorter = WanModel(WanConfig(**{**vars(CONFIG), "num_layers": 2}), torch.nn).eval()
    kept = {
        k.replace("blocks.2.", "blocks.1."): v for k, v in model.state_dict().items() if "blocks.1." not in k
    }
    shorter.load_state_dict(kept)
    assert torch.equal(ours[0], velocities(model)[0])
    assert torch.equal(ours[1], velocities(shorter)[1])
    assert not torch.equal(ours[1], velocities(model)[1])


def test_no_layers_is_bitwise_absent(model, velocities):
    assert torch.equal(velocities(model, skip_layers(())(run_blocks)), velocities(model))


@pytest.mark.parametrize("text, layers", [("", ()), (" ", ()), ("9", (9,)), ("10, 9,9", (9, 10))])
def test_layers_are_read(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["nine", "9,,10", "-1", "9.5", "9;10", "²"])
def test_what_is_not_a_block_number_is_named(text):
    with pytest.raises(ValueError, match=r"skip_layers\.layers holds"):
        parse_layers(text)


@pytest.mark.parametrize(
    "steps, start, end, first, last",
    [(30, 10, 90, 3, 26), (50, 10, 90, 5, 44), (7, 0, 100, 0, 6), (100, 29, 58, 29, 57)],
)
def test_the_steps_between_the_percents(steps, start, end, first, last):
    at = [i for i in range(steps) if is_skipped_at(i, steps, start, end)]
    assert at == list(range(first, last + 1))
