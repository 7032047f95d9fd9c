"""Plans for a step that take less memory and give the same numbers, and the choice among them."""

import pytest
import torch
from wan21.wan.chunked import block_executor
from wan21.wan.config import SIZES, WanConfig
from wan21.wan.dit import WanModel
from wan21.wan.memory import MemoryPlan, StepSize, choose_plans, plans_from, step_bytes

TOY = WanConfig(in_dim=36, dim=256, ffn_dim=1024, num_heads=2, num_layers=2, text_dim=64, image_dim=1280)

LARGE = (1, 16, 21, 90, 160)  # 720x1280, 81 frames


def test_odd_sides_are_padded():
    assert StepSize(TOY, (2, 16, 3, 17, 5)).tokens == StepSize(TOY, (2, 16, 3, 18, 6)).tokens == 2 * 3 * 9 * 3


def test_each_plan_takes_less_and_gives_the_same_numbers():
    g = torch.Generator().manual_seed(0)
    model = WanModel(TOY, torch.nn).eval().requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5)
    x = torch.randn(2, 36, 3, 10, 14, generator=g)
    text, clip = torch.randn(2, 7, 64, generator=g), torch.randn(2, 257, 1280, generator=g)
    plans = plans_from(True)
    assert plans == (MemoryPlan(), MemoryPlan(True, 4), MemoryPlan(False, 4))
    needs = [step_bytes(StepSize(SIZES["i2v-14B"], LARGE), plan) for plan in plans]
    assert needs[0] > 1.05 * needs[1] > 1.1 * needs[2]
    t = torch.full((2,), 400.0)
    with torch.no_grad():
        outs = [
            model(x, t, text, clip, pass_names=("cond", "uncond"), execute=block_executor(parts))
            for parts in (1, 2, 4, 5)
        ]
    for out in outs[1:]:
        assert torch.allclose(out, outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "budget, first",
    [(100, 0), (79, 1), (72, 2), (50, 0), (22, 1), (12, 2), (1, 2)],  # the last four stream the weights
)
def test_choice_keeps_the_weights_on_the_device_first(budget, first):
    plans = plans_from(True)
    assert choose_plans(plans, needs=(20, 15, 10), weights=60, budget=budget) == plans[first:]


def test_one_pass_needs_no_separate_walk():
    assert plans_from(True, passes=1) == (MemoryPlan(True), MemoryPlan(True, 4))
    assert plans_from(False) == (MemoryPlan(False), MemoryPlan(False, 4))
