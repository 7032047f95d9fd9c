"""Guidance rules against their formulas, written out in float64."""

import pytest
import torch
from helpers_guidance import authors_formula, random_velocities
from wan21.wan.guidance import cfg, cfg_zero_star


@pytest.fixture
def velocities():
    return random_velocities()


def test_cfg_rule(velocities):
    cond, uncond = velocities
    assert torch.allclose(cfg(cond, uncond, 1.0), cond)
    assert torch.equal(cfg(cond, uncond, 0.0), uncond)
    assert torch.allclose(cfg(cond, uncond, 2.0) - cond, cond - uncond, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0])
def test_cfg_zero_star_is_the_authors_formula(velocities, scale):
    ours = cfg_zero_star(*velocities, scale)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours.double(), authors_formula(*velocities, scale), atol=1e-5)


def test_each_sample_has_its_own_scale(velocities):
    both = cfg_zero_star(*velocities, 4.0)
    for i in range(3):
        alone = cfg_zero_star(velocities[0][i : i + 1], velocities[1][i : i + 1], 4.0)
        assert torch.allclose(both[i : i + 1], alone, atol=1e-6)


def test_a_longer_unconditional_velocity_changes_nothing(velocities):
    """The rule's point: only the direction of the unconditional velocity counts."""
    cond, uncond = velocities
    expected = cfg_zero_star(cond, uncond, 5.0)
    assert torch.allclose(cfg_zero_star(cond, 3 * uncond, 5.0), expected, atol=1e-5)
    assert not torch.allclose(cfg(cond, 3 * uncond, 5.0), cfg(cond, uncond, 5.0), atol=1e-1)


def test_half_precision_is_reduced_in_float32(velocities):
    cond, uncond = (v.half() for v in velocities)
    exact = authors_formula(cond, uncond, 5.0)
    assert torch.allclose(cfg_zero_star(cond, uncond, 5.0).double(), exact, atol=1e-5)


def test_no_unconditional_velocity_at_all():
    cond = torch.ones(1, 16, 1, 2, 2)
    assert torch.equal(cfg_zero_star(cond, torch.zeros_like(cond), 5.0), 5 * cond)
