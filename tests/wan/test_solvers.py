"""The solvers against diffusers, exact solutions and their own contract.

The release's own schedulers (wan/utils/fm_solvers*.py) and diffusers' agree in every update rule used here,
given the same sigmas. They differ in the grid: diffusers' runs from 1 to 1/1000 and lowers a first sigma of
1 by 1e-6, where the release's UniPC starts at 0.999 and its DPM-Solver++ at 1. The release is followed, so
these tests put its grid into diffusers' schedulers. Against the release's classes themselves, in a run that
is not part of this suite (11 step counts from 1 to 50, 5 shifts from 1 to 16), the relative difference at the
end was at most 4e-7 in float32, and 1e-15 with float64 throughout (DPM-Solver++'s cast to float32 taken out).
"""

import itertools
import math

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from helpers import relative
from hypothesis import given, settings
from hypothesis import strategies as st
from wan21.wan.sigmas import flow_sigmas, partial_sigmas
from wan21.wan.solvers import ADD_NOISE, SOLVERS, sample_dpmpp_2m, sample_unipc, solve

SHAPE = (1, 4, 2, 3, 3)  # B C F H W; nothing depends on it

# Those that add noise on the way are compared with the host's in tests/nodes/test_native_sampling.py.
ODE_SOLVERS = sorted(SOLVERS.keys() - set(ADD_NOISE))
ode_solver = pytest.mark.parametrize("solver", ODE_SOLVERS)
every_solver = pytest.mark.parametrize("solver", sorted(SOLVERS))


def noise(seed=0, dtype=torch.float64):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def fresh(x):
    """New noise of the shape of x, the same in each run."""
    generator = torch.Generator().manual_seed(3)
    return lambda sigma, sigma_next: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def toy_velocity(x, sigma):
    """A random two-layer network over channels, bent by sigma. Nonlinear in x and in sigma."""
    generator = torch.Generator().manual_seed(7)
    w_in, w_out = torch.randn(2, 16, SHAPE[1], generator=generator, dtype=torch.float64).to(x.dtype)
    bias = torch.randn(16, generator=generator, dtype=torch.float64).to(x.dtype)
    hidden = torch.tanh(torch.einsum("bcfhw,dc->bfhwd", x, w_in) + (1 + 2 * sigma) * bias)
    return torch.einsum("bfhwd,dc->bcfhw", hidden, w_out) + 0.3 * math.cos(2 * sigma) * x


def run_diffusers(scheduler, x, sigmas):
    """Run a diffusers scheduler over our sigmas."""
    scheduler.set_timesteps(len(sigmas) - 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=x.dtype)
    scheduler.set_begin_index(0)
    for t, sigma in zip(scheduler.timesteps, sigmas):
        x = scheduler.step(toy_velocity(x, sigma), t, x, return_dict=False)[0]
    return x


def diffusers_scheduler(solver, shift):
    common = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    if solver == "unipc":
        return UniPCMultistepScheduler(solver_order=2, solver_type="bh2", **common)
    return DPMSolverMultistepScheduler(solver_order=2, algorithm_type="dpmsolver++", **common)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    # On tensors this small threads only wait for each other, for seconds on a busy machine.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def float64_by_default():
    # diffusers makes some coefficients in the default dtype.
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


SCHEDULES = list(itertools.product([1, 2, 3, 4, 20, 50], [3.0, 5.0, 7.0]))
SCHEDULES.append((4, 0.3))  # shifts DPM-Solver++'s first sigma to 0.9999999999999999, which must act as 1


@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_unipc_equals_diffusers_in_float64(steps, shift, float64_by_default):
    sigmas = flow_sigmas(steps, shift, "unipc")
    expected = run_diffusers(diffusers_scheduler("unipc", shift), noise(), sigmas)
    assert relative(solve(sample_unipc, toy_velocity, noise(), sigmas), expected) < 1e-12


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
@pytest.mark.parametrize(("steps", "shift"), SCHEDULES)
def test_equals_diffusers_in_float32(solver, steps, shift):
    sigmas = flow_sigmas(steps, shift, solver)
    x = noise(dtype=torch.float32)
    expected = run_diffusers(diffusers_scheduler(solver, shift), x, sigmas)
    assert relative(solve(SOLVERS[solver], toy_velocity, x, sigmas), expected) < 3e-6


@pytest.mark.parametrize("solver", ["unipc", "dpm++"])
def test_partial_run_equals_diffusers(solver):
    sigmas = partial_sigmas(12, 5.0, solver, 0.6)
    x = noise(dtype=torch.float32)
    expected = run_diffusers(diffusers_scheduler(solver, 5.0), x, sigmas)
    assert relative(solve(SOLVERS[solver], toy_velocity, x, sigmas), expected) < 3e-6


@ode_solver
@given(st.integers(1, 60), st.floats(0.1, 100), st.floats(0.05, 1))
@settings(deadline=None, max_examples=40)
def test_constant_velocity_is_solved_exactly(solver, steps, shift, denoise):
    sigmas = partial_sigmas(steps, shift, solver, denoise)
    v = noise(1)
    end = solve(SOLVERS[solver], lambda x, sigma: v, noise(), sigmas)
    torch.testing.assert_close(end, noise() - sigmas[0] * v, rtol=0, atol=1e-12)


MEAN, VARIANCE = 0.7, 0.25


def gaussian_velocity(x, sigma):
    """The exact velocity when clean latents are N(MEAN, VARIANCE): E[noise - clean | x]."""
    alpha = 1 - sigma
    total = alpha**2 * VARIANCE + sigma**2
    return (sigma - alpha * VARIANCE) / total * (x - alpha * MEAN) - MEAN


def gaussian_flow(x, sigma, sigma_end=0.0):
    """Where the flow of `gaussian_velocity` carries x from `sigma` to `sigma_end`."""

    def deviation(sigma):
        return math.sqrt((1 - sigma) ** 2 * VARIANCE + sigma**2)

    start = x - (1 - sigma) * MEAN
    return (1 - sigma_end) * MEAN + deviation(sigma_end) / deviation(sigma) * start


def measured_orders(errors):
    """The exponent p of error ~ steps**-p between each run and the next, which has twice the steps."""
    return [math.log2(a / b) for a, b in itertools.pairwise(errors)]


# h does not shrink near sigma 0 and 1. That makes DPM-Solver++'s error steps**-2 * log(steps), whose measured
# order creeps up to 2 from below; UniPC's corrector repairs it up to the last, first-order step.
@pytest.mark.parametrize(
    ("solver", "lowest", "highest"), [("euler", 0.97, 1.03), ("unipc", 1.85, 2.1), ("dpm++", 1.55, 2.05)]
)
@pytest.mark.parametrize(("shift", "denoise"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.5)])
def test_order_of_convergence_on_wans_schedules(solver, lowest, highest, shift, denoise):
    errors = []
    for steps in (160, 320, 640):
        sigmas = partial_sigmas(steps, shift, solver, denoise)
        end = solve(SOLVERS[solver], gaussian_velocity, noise(), sigmas)
        errors.append(relative(end, gaussian_flow(noise(), sigmas[0])))
    assert all(lowest < p < highest for p in measured_orders(errors)), (errors, measured_orders(errors))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence_on_even_lambdas(solver, order):
    # Away from sigma 0 and 1 with equal h, looking at the latent before the first-order last step: here the
    # corrector shows its order 3.
    errors = []
    for steps in (40, 80, 160):
        sigmas = [1 / (1 + math.exp(-2 + 4 * i / steps)) for i in range(steps + 1)]
        seen = []
        solve(SOLVERS[solver], gaussian_velocity, noise(), sigmas, lambda i, x0, x, seen=seen: seen.append(x))
        errors.append(relative(seen[-1], gaussian_flow(noise(), sigmas[0], sigmas[-2])))
    assert all(abs(p - order) < 0.25 for p in measured_orders(errors)), (errors, measured_orders(errors))


def test_second_order_pays_at_twenty_steps():
    errors = {}
    for solver in ODE_SOLVERS:
        sigmas = flow_sigmas(20, 3.0, solver)
        end = solve(SOLVERS[solver], gaussian_velocity, noise(), sigmas)
        errors[solver] = relative(end, gaussian_flow(noise(), sigmas[0]))
    assert errors["unipc"] < errors["dpm++"] < errors["euler"] / 3, errors


def test_dpmpp_is_finite_from_pure_noise():
    for steps, shift in [(1, 5.0), (2, 5.0), (3, 5.0), (30, 16.0), (30, 0.3)]:
        x = noise(dtype=torch.float32).requires_grad_()
        end = solve(sample_dpmpp_2m, toy_velocity, x, flow_sigmas(steps, shift, "dpm++"))
        end.square().sum().backward()
        assert end.isfinite().all() and x.grad.isfinite().all()


@ode_solver
def test_one_and_two_steps_by_hand(solver):
    # One step is Euler's for all. Of two, DPM-Solver++ has no second-order step and UniPC's corrector only
    # touches a latent that the last step discards.
    x, s0 = noise(), 0.8
    one = x - s0 * toy_velocity(x, s0)
    torch.testing.assert_close(solve(SOLVERS[solver], toy_velocity, x, [s0, 0.0]), one)
    half = x - 0.5 * toy_velocity(x, s0)
    two = half - 0.3 * toy_velocity(half, 0.3)
    torch.testing.assert_close(solve(SOLVERS[solver], toy_velocity, x, [s0, 0.3, 0.0]), two)


def test_unipc_takes_a_grid_that_starts_at_one():
    x = noise()
    end = solve(sample_unipc, gaussian_velocity, x, flow_sigmas(50, 5.0, "euler"))
    assert relative(end, gaussian_flow(x, 1.0)) < 2e-3


@ode_solver
def test_velocity_is_asked_once_per_sigma_and_callback_sees_it(solver):
    sigmas = flow_sigmas(9, 5.0, solver)
    asked, seen = [], []

    def velocity(x, sigma):
        v = toy_velocity(x, sigma)
        asked.append((sigma, x, v))
        return v

    solve(SOLVERS[solver], velocity, noise(), sigmas, lambda i, x0, x: seen.append((i, x0, x)))
    assert [sigma for sigma, _, _ in asked] == sigmas[:-1]
    assert all(type(sigma) is float for sigma, _, _ in asked)
    assert [i for i, _, _ in seen] == list(range(9))
    for (sigma, asked_x, v), (_, x0, x) in zip(asked, seen):
        assert x is asked_x
        torch.testing.assert_close(x0, x - sigma * v, rtol=0, atol=0)


@every_solver
def test_runs_are_isolated(solver):
    x = noise(dtype=torch.float32)
    before = x.clone()
    sigmas = flow_sigmas(12, 5.0, solver)
    kept = list(sigmas)
    first = solve(SOLVERS[solver], toy_velocity, x, sigmas, noise=fresh(x))
    solve(SOLVERS[solver], gaussian_velocity, x, flow_sigmas(5, 3.0, solver), noise=fresh(x))
    again = solve(SOLVERS[solver], toy_velocity, x, sigmas, lambda *seen: None, fresh(x))
    assert torch.equal(first, again)
    assert torch.equal(x, before) and sigmas == kept


@every_solver
def test_a_cancelled_run_leaves_nothing_behind(solver):
    x, sigmas = noise(), flow_sigmas(6, 5.0, solver)
    expected = solve(SOLVERS[solver], toy_velocity, x, sigmas, noise=fresh(x))

    def cancel(i, x0, x):
        if i == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        solve(SOLVERS[solver], toy_velocity, x, sigmas, cancel, fresh(x))
    assert torch.equal(solve(SOLVERS[solver], toy_velocity, x, sigmas, noise=fresh(x)), expected)


@ode_solver
def test_latent_stays_float32_under_a_bfloat16_model(solver):
    v = noise(1, torch.bfloat16)
    sigmas = flow_sigmas(8, 5.0, solver)
    end = solve(SOLVERS[solver], lambda x, sigma: v, noise(dtype=torch.float32), sigmas)
    assert end.dtype == torch.float32
    torch.testing.assert_close(end, noise(dtype=torch.float32) - sigmas[0] * v.float())


@every_solver
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4)])
def test_any_shape(solver, shape):
    x = torch.full(shape, 0.5)
    end = solve(SOLVERS[solver], gaussian_velocity, x, flow_sigmas(4, 5.0, solver), noise=fresh(x))
    assert end.shape == shape and end.isfinite().all()
