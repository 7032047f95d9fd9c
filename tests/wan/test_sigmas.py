"""The schedules against the release's formulas in NumPy and its published values."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wan21.wan.sigmas import FIRST_SIGMA, flow_sigmas, partial_sigmas, timesteps
from wan21.wan.solvers import SOLVERS

solvers = st.sampled_from(sorted(SOLVERS))
shifts = st.floats(0.001, 1000)


def release_grid(steps, shift, solver):
    """The release's sigmas before it rounds them to float32, and its timesteps."""
    # The release's sigma_max is read back from a float32 tensor: 0.99900001..., not 0.999.
    first = float(np.float32(1 - 1 / 1000)) if solver == "unipc" else 1
    base = np.linspace(first, 0, steps + 1)[:-1]
    sigmas = shift * base / (1 + (shift - 1) * base)
    return sigmas, (sigmas * 1000).astype(np.int64)


def test_every_solver_has_a_grid():
    assert set(FIRST_SIGMA) == set(SOLVERS)


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_grid_and_timesteps_equal_the_release_exactly(solver):
    # A wider sweep against the release's own classes, run once (shifts 0.01 to 100), found no difference.
    for shift in [0.3, 1.0, 1.7, 3.0, 5.0, 7.0, 8.0, 12.3, 16.0, 25.0, 100.0]:
        for steps in range(1, 101):
            sigmas = flow_sigmas(steps, shift, solver)
            expected_sigmas, expected_timesteps = release_grid(steps, shift, solver)
            # One ulp: at shift below 1 the release's first value can exceed 1, ours is held at 1.
            np.testing.assert_allclose(sigmas[:-1], expected_sigmas, rtol=3e-16, atol=0)
            assert timesteps(sigmas, solver) == expected_timesteps.tolist()


def test_published_timesteps():
    t = timesteps(flow_sigmas(30, 5.0, "unipc"), "unipc")
    assert t[:5] == [999, 992, 985, 978, 969]
    assert t[-3:] == [356, 262, 146]
    assert timesteps(flow_sigmas(30, 5.0, "dpm++"), "dpm++")[0] == 1000


def test_first_sigma_of_unipc_is_the_float32_one():
    # From a float64 0.999 the second step is 665.99..., truncated to 665; the release says 666.
    assert timesteps(flow_sigmas(3, 1.0, "unipc"), "unipc") == [999, 666, 333]


def test_euler_is_told_exact_timesteps():
    sigmas = flow_sigmas(7, 5.0, "euler")
    assert sigmas == flow_sigmas(7, 5.0, "dpm++")
    assert timesteps(sigmas, "euler") == [1000 * s for s in sigmas[:-1]]


@given(st.integers(1, 300), shifts, solvers)
def test_grid_properties(steps, shift, solver):
    sigmas = flow_sigmas(steps, shift, solver)
    assert len(sigmas) == steps + 1
    assert all(type(s) is float for s in sigmas)
    assert all(a > b for a, b in pairwise(sigmas))
    assert sigmas[0] <= 1 and sigmas[-1] == 0
    assert all(0 <= t <= 1000 for t in timesteps(sigmas, solver))


def test_partial_schedule_ends_like_the_longer_run():
    assert partial_sigmas(10, 5.0, "unipc", 0.5) == flow_sigmas(20, 5.0, "unipc")[-11:]
    assert partial_sigmas(10, 5.0, "unipc", 1.0) == flow_sigmas(10, 5.0, "unipc")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": math.nan}, "steps is nan"),
        ({"shift": 0.0}, "shift is 0.0"),
        ({"shift": -1.0}, "shift is -1.0"),
        ({"shift": math.inf}, "shift is inf"),
        ({"shift": math.nan}, "shift is nan"),
        ({"solver": "heun"}, r"solver is 'heun'.*unipc, dpm\+\+, euler"),
        ({"denoise": 0.0}, "denoise is 0.0"),
        ({"denoise": 1.01}, "denoise is 1.01"),
        ({"denoise": -0.5}, "denoise is -0.5"),
        ({"denoise": math.nan}, "denoise is nan"),
        ({"denoise": 5e-324}, "denoise is 5e-324"),
    ],
)
def test_bad_values_are_named(kwargs, message):
    good = {"steps": 4, "shift": 5.0, "solver": "unipc", "denoise": 0.5}
    with pytest.raises(ValueError, match=message):
        partial_sigmas(**(good | kwargs))
    if "denoise" not in kwargs:
        del good["denoise"]
        with pytest.raises(ValueError, match=message):
            flow_sigmas(**(good | kwargs))


def test_timesteps_refuses_an_unknown_solver():
    with pytest.raises(ValueError, match="solver is 'ddim'"):
        timesteps([1.0, 0.0], "ddim")
