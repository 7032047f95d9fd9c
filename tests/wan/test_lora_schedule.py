"""The strength of a LoRA over the steps: which multiplier belongs to which step."""

import pytest
from wan21.wan.lora import parse_schedule, scheduled, step_at
from wan21.wan.sigmas import flow_sigmas, timesteps


def test_integer_index():
    """Three values over 30 steps switch at 10 and 20 (an index from float sums switches at 11)."""
    values = [scheduled([1.0, 0.5, 0.0], i, 30) for i in range(30)]
    assert values == [1.0] * 10 + [0.5] * 10 + [0.0] * 10
    assert [scheduled([1, 2, 3], i, 2) for i in range(2)] == [1, 2]
    assert [scheduled([7], i, 5) for i in range(5)] == [7] * 5


@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
@pytest.mark.parametrize("steps, shift", [(1, 5.0), (4, 3.0), (30, 5.0), (50, 16.0)])
def test_each_timestep_is_its_own_step(solver, steps, shift):
    sigmas = flow_sigmas(steps, shift, solver)
    told = [t / 1000 for t in timesteps(sigmas, solver)]
    assert [step_at(sigma, sigmas) for sigma in told] == list(range(steps))


def test_between_two_sigmas_it_is_the_step_under_way():
    assert step_at(0.75, [1.0, 0.8, 0.5, 0.0]) == 1
    assert step_at(0.0, [1.0, 0.8, 0.5, 0.0]) == 2


def test_a_schedule_is_read_from_text():
    assert parse_schedule(" ") == []
    assert parse_schedule("1, .5,-0.25") == [1.0, 0.5, -0.25]


@pytest.mark.parametrize(
    "text, entry", [("1,,2", "''"), ("1, x", "'x'"), ("nan", "'nan'"), ("1 0.5", "'1 0.5'")]
)
def test_a_bad_entry_is_named(text, entry):
    with pytest.raises(ValueError, match=f"strength_schedule holds {entry}; it must be a list"):
        parse_schedule(text)
