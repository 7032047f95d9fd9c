"""Solvers: generators that carry a latent from noise to video along a schedule of sigmas.

A solver yields (x, sigma) where it wants a velocity, is sent it, and returns the latent at the last sigma. It
never learns what is behind the velocity: guidance, caching, and which model; between two steps the work can
pass to another model (`wan.sample.Sampling`). What a multistep solver remembers is in its local variables and
is gone when it returns.

Every solver is `sample_x(x, sigmas, callback, noise)`:

    x         the latent at sigmas[0]; not modified
    sigmas    strictly decreasing, in [0, 1]
    callback  called after the first velocity of each step as callback(step, x0, x): the step from 0, the
              clean latent predicted in it, and the latent the velocity was asked about; it modifies none
    noise     noise(sigma, sigma_next): standard normal of the shape of x, for those that add some on the way

Legend:
    sigma   share of noise in x, 1 to 0; the share of video is alpha = 1 - sigma
    v       velocity, noise - clean: the slope of x over sigma
    x0      the clean latent that x points to: x - sigma * v
    lambda  log(alpha / sigma), the clock of the second-order solvers; h is a step on it

Tensors may have any shape; they keep the dtype of x, which should be float32. Coefficients are worked out in
Python floats (float64), so sigmas near 1 lose nothing in alpha = 1 - sigma.
"""

import math
from collections.abc import Callable, Generator
from itertools import pairwise

import torch
from torch import Tensor

Solver = Generator[tuple[Tensor, float], Tensor, Tensor]
Velocity = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]
NoiseSampler = Callable[[float, float], Tensor]


def solve(
    solver: Callable[..., Solver],
    velocity: Velocity,
    x: Tensor,
    sigmas: list[float],
    callback: Callback | None = None,
    noise: NoiseSampler | None = None,
) -> Tensor:
    """The latent at the last sigma, by one of `SOLVERS` and one velocity for the whole way."""
    steps = solver(x, sigmas, callback, noise)
    try:
        asked = next(steps)
        while True:
            asked = steps.send(velocity(*asked))
    except StopIteration as done:
        return done.value


def sample_euler(
    x: Tensor, sigmas: list[float], callback: Callback | None = None, noise: NoiseSampler | None = None
) -> Solver:
    """Euler's method: straight lines along the velocity, first order."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = (yield x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x - sigma * v, x)
        x = x + (sigma_next - sigma) * v
    return x


def sample_dpmpp_2m(
    x: Tensor, sigmas: list[float], callback: Callback | None = None, noise: NoiseSampler | None = None
) -> Solver:
    """DPM-Solver++(2M): second order with one velocity per step, https://arxiv.org/abs/2211.01095, alg. 2.

    The deterministic midpoint form of the Wan2.1 release (wan/utils/fm_solvers.py). The first step has no
    past and one to sigma 0 no finite h, so both are first order.
    """
    lambdas = [_log_snr(sigma) for sigma in sigmas]
    x0_last = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * (yield x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        x = _move(x, _predicted_x0(x0, x0_last, lambdas, i), sigma, sigma_next)
        x0_last = x0
    return x


def sample_unipc(
    x: Tensor, sigmas: list[float], callback: Callback | None = None, noise: NoiseSampler | None = None
) -> Solver:
    """UniPC-2, B2(h), data prediction: a corrected DPM-Solver++(2M), https://arxiv.org/abs/2302.04867.

    Each new x0 first serves to redo the step that led to it (UniC), then to take the next one (UniP, which at
    order 2 in the Wan2.1 release, wan/utils/fm_solvers_unipc.py, is exactly DPM-Solver++(2M)'s step). The
    callback's x is the uncorrected latent, the one the velocity was asked about.
    """
    lambdas = [_log_snr(sigma) for sigma in sigmas]
    x_last = x0_last = x0_before = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * (yield x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        if x_last is not None and x0_last is not None:
            x = _move(x_last, _corrected_x0(x0, x0_last, x0_before, lambdas, i), sigmas[i - 1], sigma)
        x_last = x
        x = _move(x, _predicted_x0(x0, x0_last, lambdas, i), sigma, sigma_next)
        x0_before, x0_last = x0_last, x0
    return x


def sample_lcm(
    x: Tensor, sigmas: list[float], callback: Callback | None = None, noise: NoiseSampler | None = None
) -> Solver:
    """Consistency sampling, https://arxiv.org/abs/2310.04378: to the clean latent, and back by new noise.

    For models that were distilled to few steps.
    """
    assert noise is not None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * (yield x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        x = x0 if sigma_next <= 0 else (1 - sigma_next) * x0 + sigma_next * noise(sigma, sigma_next)
    return x


def sample_dpmpp_sde(
    x: Tensor, sigmas: list[float], callback: Callback | None = None, noise: NoiseSampler | None = None
) -> Solver:
    """DPM-Solver++(SDE), https://arxiv.org/abs/2211.01095: two velocities a step, and new noise in both.

    The midpoint form of k-diffusion (r = 1/2, eta = 1). The first sigma is below 1, where lambda is finite:
    see `wan.sigmas.BELOW_ONE`.
    """
    assert noise is not None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * (yield x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        if sigma_next <= 0:
            x = x0
            continue
        middle, lambda_middle = _half_way(sigma, sigma_next)
        half_way = _move_with_noise(x, x0, sigma, middle, lambda_middle, noise)
        x0 = half_way - middle * (yield half_way, middle).to(x.dtype)
        x = _move_with_noise(x, x0, sigma, sigma_next, _log_snr32(sigma_next), noise)
    return x


SOLVERS = {
    "unipc": sample_unipc,
    "dpm++": sample_dpmpp_2m,
    "euler": sample_euler,
    "lcm": sample_lcm,
    "dpm++_sde": sample_dpmpp_sde,
}
ADD_NOISE = ("lcm", "dpm++_sde")  # on the way


def _log_snr(sigma: float) -> float:
    """lambda = log(alpha / sigma), in [-inf, inf]; within 1e-12 of 1, by rounding, sigma counts as 1."""
    if sigma <= 0:
        return math.inf
    return math.log((1 - sigma) / sigma) if sigma < 1 - 1e-12 else -math.inf


def _move(x: Tensor, x0: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """x carried from `sigma` to `sigma_next` as if it pointed to this x0 all the way.

    The papers write sigma_next / sigma * x - alpha_next * (exp(-h) - 1) * x0. With alpha = 1 - sigma that
    factor of x0 is exactly 1 - sigma_next / sigma, which needs no logarithm and holds at sigma 1 and 0.
    """
    ratio = sigma_next / sigma
    return ratio * x + (1 - ratio) * x0


def _half_way(sigma: float, sigma_next: float) -> tuple[float, Tensor]:
    """The sigma whose lambda lies between those of two others, and that lambda; to the bit as k-diffusion's.

    Its noise is a path over sigma, sampled there: one unit in the last place away it is another noise.
    """
    start, end = _log_snr32(sigma), _log_snr32(sigma_next)
    middle = start + 0.5 * (end - start)
    return middle.neg().sigmoid().item(), middle


def _move_with_noise(
    x: Tensor, x0: Tensor, sigma: float, sigma_next: float, end: Tensor, noise: NoiseSampler
) -> Tensor:
    """As `_move`, by the stochastic equation: twice as far in lambda, then new noise up to `sigma_next`.

    In float32 and in k-diffusion's form, with sigma / alpha as its sigma: `down` is the root of a difference
    of near squares, whose rounding shows in a first step from almost pure noise (3e-4), as people know it.
    For the same reason `end`, the lambda of `sigma_next`, is not worked out from a sigma that was made of it.
    """
    start = _log_snr32(sigma)
    alpha, alpha_next = sigma * start.exp(), sigma_next * end.exp()
    begin, to = start.neg().exp(), end.neg().exp()
    up = torch.minimum(to, (to**2 * (begin**2 - to**2) / begin**2).sqrt())
    down = (to**2 - up**2).sqrt()
    h = down.log().neg() - start
    x = alpha_next / alpha * h.neg().exp() * x - alpha_next * h.neg().expm1() * x0
    return x + alpha_next * noise(sigma, sigma_next) * up


def _log_snr32(sigma: float) -> Tensor:
    return torch.tensor(sigma, dtype=torch.float32).logit().neg()


def _predicted_x0(x0: Tensor, x0_last: Tensor | None, lambdas: list[float], i: int) -> Tensor:
    """The x0 for step i: the last two estimates, extrapolated linearly by h/2.

    The first step has one estimate and one to sigma 0 no finite h: both are first order.
    """
    if x0_last is None or math.isinf(lambdas[i + 1]):
        return x0
    h, h_last = lambdas[i + 1] - lambdas[i], lambdas[i] - lambdas[i - 1]
    return x0 + 0.5 * h / h_last * (x0 - x0_last)  # after sigma 1 h_last is infinite: the term is zero


def _corrected_x0(
    x0: Tensor, x0_last: Tensor, x0_before: Tensor | None, lambdas: list[float], i: int
) -> Tensor:
    """The x0 for redoing step i - 1 now that the estimate at its end is known (UniC).

    The weights solve the paper's order conditions, [[1, 1], [r, 1]] @ rho = b, with r the lambda of
    `x0_before` seen from `x0_last` in units of h, and b = (phi_2, 2 phi_3) / phi_1 at -h. Without an
    `x0_before`, after the first step, the release takes 1/2.
    """
    if x0_before is None:
        return x0_last + 0.5 * (x0 - x0_last)
    h = lambdas[i] - lambdas[i - 1]
    r = (lambdas[i - 2] - lambdas[i - 1]) / h
    inverse = 1 / math.expm1(-h)
    b1 = -1 / h - inverse
    b2 = -2 * b1 / h - inverse
    rho_before = (b1 - b2) / (1 - r)
    rho_now = b1 - rho_before
    return x0_last + rho_before / r * (x0_before - x0_last) + rho_now * (x0 - x0_last)
