"""Solvers: functions that carry a latent from noise to video along a schedule of sigmas.

Every solver is `sample_x(velocity, x, sigmas, callback)`. It calls `velocity(x, sigma)` once per step and
never learns what is behind it; guidance and caching happen in there. What a multistep solver remembers is
in its local variables and is gone when it returns.

Legend:
    sigma   share of noise in x, 1 to 0; the share of video is alpha = 1 - sigma
    v       velocity, noise - clean: the slope of x over sigma
    x0      the clean latent that x points to: x - sigma * v
    lambda  log(alpha / sigma), the clock of the second-order solvers; h is a step on it

Tensors may have any shape; they keep the dtype of x, which should be float32. Coefficients are worked out in
Python floats (float64), so sigmas near 1 lose nothing in alpha = 1 - sigma.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, Tensor, Tensor], None]


def sample_euler(
    velocity: Velocity, x: Tensor, sigmas: list[float], callback: Callback | None = None
) -> Tensor:
    """Euler's method: straight lines along the velocity, first order.

    Args:
        velocity: called as velocity(x, sigma) at sigmas[0], sigmas[1], ... and not at the last one; returns
            the flow prediction, noise - clean, of the shape of x.
        x: the latent at sigmas[0]. It is not modified.
        sigmas: strictly decreasing, in [0, 1], with 0 last.
        callback: called after each velocity as callback(step, x0, x): the step from 0, the clean latent
            predicted in that step, and the latent the velocity was asked about. It must not modify them.

    Returns:
        The latent at the last sigma.
    """
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        v = velocity(x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x - sigma * v, x)
        x = x + (sigma_next - sigma) * v
    return x


def sample_dpmpp_2m(
    velocity: Velocity, x: Tensor, sigmas: list[float], callback: Callback | None = None
) -> Tensor:
    """DPM-Solver++(2M): second order with one velocity per step, https://arxiv.org/abs/2211.01095, alg. 2.

    The deterministic midpoint form of the Wan2.1 release (wan/utils/fm_solvers.py). The first step has no
    past and the last no finite h, so both are first order.

    Args:
        velocity, x, sigmas, callback: as in `sample_euler`.

    Returns:
        The latent at the last sigma.
    """
    lambdas = [_log_snr(sigma) for sigma in sigmas]
    x0_last = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * velocity(x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        x = _move(x, _predicted_x0(x0, x0_last, lambdas, i), sigma, sigma_next)
        x0_last = x0
    return x


def sample_unipc(
    velocity: Velocity, x: Tensor, sigmas: list[float], callback: Callback | None = None
) -> Tensor:
    """UniPC-2, B2(h), data prediction: a corrected DPM-Solver++(2M), https://arxiv.org/abs/2302.04867.

    Each new x0 first serves to redo the step that led to it (UniC), then to take the next one (UniP, which at
    order 2 in the Wan2.1 release, wan/utils/fm_solvers_unipc.py, is exactly DPM-Solver++(2M)'s step).

    Args:
        velocity, x, sigmas, callback: as in `sample_euler`. The callback's x is the uncorrected latent, the
            one the velocity was asked about.

    Returns:
        The latent at the last sigma.
    """
    lambdas = [_log_snr(sigma) for sigma in sigmas]
    x_last = x0_last = x0_before = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = x - sigma * velocity(x, sigma).to(x.dtype)
        if callback is not None:
            callback(i, x0, x)
        if x_last is not None and x0_last is not None:
            x = _move(x_last, _corrected_x0(x0, x0_last, x0_before, lambdas, i), sigmas[i - 1], sigma)
        x_last = x
        x = _move(x, _predicted_x0(x0, x0_last, lambdas, i), sigma, sigma_next)
        x0_before, x0_last = x0_last, x0
    return x


SOLVERS = {"unipc": sample_unipc, "dpm++": sample_dpmpp_2m, "euler": sample_euler}


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


def _predicted_x0(x0: Tensor, x0_last: Tensor | None, lambdas: list[float], i: int) -> Tensor:
    """The x0 for step i: the last two estimates, extrapolated linearly by h/2.

    The first step has one estimate and the last no finite h: both are first order.
    """
    if x0_last is None or i in (0, len(lambdas) - 2):
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
