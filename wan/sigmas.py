"""Noise schedules of Wan2.1: which noise levels a sampling run visits, and the timestep the model is told.

A sigma is the share of noise in a latent, x = (1 - sigma) * clean + sigma * noise: 1 is pure noise and 0 is
the finished video. Everything here is plain Python floats, the precision the release builds its grids in.

Source: Wan2.1, wan/utils/fm_solvers_unipc.py and wan/utils/fm_solvers.py (`set_timesteps`,
`get_sampling_sigmas`). The shift is Stable Diffusion 3's, https://arxiv.org/abs/2403.03206.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .refusal import Refusal

# Solver -> first value of its grid before the shift. UniPC's 0.999 is the release's 1 - 1/1000 after a trip
# through float32; with 0.999 itself some timesteps would truncate one lower than the release's.
FIRST_SIGMA = {"unipc": 0.9990000128746033, "dpm++": 1.0, "euler": 1.0, "lcm": 1.0, "dpm++_sde": 1.0}
WHOLE_TIMESTEPS = ("unipc", "dpm++")  # as the release rounds them
# In float32, as k-diffusion holds sigmas: near 1 the timestep feels it, and noise that is a path over sigma.
IN_FLOAT32 = ("lcm", "dpm++_sde")
# Before the shift, in place of a first sigma of 1, for a solver that divides by alpha there; k-diffusion's.
BELOW_ONE = {"dpm++_sde": 0.9999}


def flow_sigmas(steps: int, shift: float, solver: str = "unipc") -> list[float]:
    """The schedule of a full run: an even grid from the solver's first sigma to 0, then shifted.

    Args:
        steps: number of model evaluations, at least 1.
        shift: how much of the run is spent at high noise, in [0.001, 1000]; 1 leaves the grid even, Wan2.1
            uses 3 (480p) to 16 (first-last-frame).
        solver: a key of `wan.solvers.SOLVERS`.

    Returns:
        steps + 1 strictly decreasing sigmas in [0, 1]; the last is exactly 0.

    Raises:
        Refusal: an argument is outside its range.
    """
    _check_schedule(steps, shift, solver)
    first = FIRST_SIGMA[solver]
    # The order of operations is NumPy's linspace: another one rounds differently and truncates differently.
    grid = [i * (-first / steps) + first for i in range(steps)]
    grid[0] = min(grid[0], BELOW_ONE.get(solver, 1.0))
    # Below shift 1 rounding can carry the first value an ulp past 1.
    return [min(1.0, shift * s / (1 + (shift - 1) * s)) for s in grid] + [0.0]


def timestep(sigma: float, solver: str) -> float:
    """The timestep, in [0, 1000], that the model is told at a noise level.

    For UniPC and DPM-Solver++ the release truncates to whole timesteps, so the model is told a slightly lower
    noise level than the solver works with. The others, which the release does not have, tell the exact one.

    Args:
        sigma: in [0, 1], of a schedule or between two of it.
        solver: a key of `wan.solvers.SOLVERS`.

    Raises:
        Refusal: the solver is unknown.
    """
    _check_solver(solver)
    if solver in IN_FLOAT32:
        sigma = in_float32(sigma)
    return float(math.trunc(1000 * sigma)) if solver in WHOLE_TIMESTEPS else 1000 * sigma


def in_float32(sigma: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", sigma))[0]


def timesteps(sigmas: list[float], solver: str) -> list[float]:
    """The `timestep` of each step of a schedule: n of n + 1 sigmas, since none begins at the last."""
    return [timestep(sigma, solver) for sigma in sigmas[:-1]]


def is_full_run(denoise: float) -> bool:
    """Whether a run of this share of the schedule is all of it, by the host's own limit."""
    return denoise > 0.9999


def partial_sigmas(steps: int, shift: float, solver: str, denoise: float) -> list[float]:
    """The schedule of a run that starts part way, from a latent that is only partly noise.

    The last `steps` steps of a run of int(steps / denoise).

    Args:
        steps: number of model evaluations, at least 1.
        shift: as in `flow_sigmas`.
        solver: a key of `wan.solvers.SOLVERS`.
        denoise: share of the longer run that is done, in (0, 1]; see `is_full_run`.

    Returns:
        steps + 1 strictly decreasing sigmas in [0, 1]; the last is exactly 0.

    Raises:
        Refusal: an argument is outside its range.
    """
    _check_schedule(steps, shift, solver)
    if not 0.0001 <= denoise <= 1:
        raise Refusal(
            f"denoise is {denoise!r}; it must be above 0 and at most 1 (the smallest is 0.0001)",
            "Use 1 to start from pure noise",
        )
    full_steps = steps if is_full_run(denoise) else int(steps / denoise)
    return flow_sigmas(full_steps, shift, solver)[-(steps + 1) :]


@dataclass(frozen=True)
class StepRange:
    """A part of a schedule, by the host's names and rules (KSamplerAdvanced).

    Attributes:
        start_at_step, end_at_step: from and up to which step, from 0; an end past the last is the end.
        add_noise: whether noise is added to the latent, which otherwise carries it from an earlier part.
        return_with_leftover_noise: whether the latent keeps the noise of the last sigma; without it the last
            step of a part that ends early goes on to 0.
    """

    start_at_step: int = 0
    end_at_step: int = 10000
    add_noise: bool = True
    return_with_leftover_noise: bool = False

    def of(self, sigmas: Sequence[float]) -> list[float]:
        """The sigmas of the part.

        Raises:
            Refusal: no step lies in it.
        """
        steps = len(sigmas) - 1
        end = min(self.end_at_step, steps)
        if self.start_at_step >= end:
            raise Refusal(
                f"start_at_step is {self.start_at_step} and end_at_step {self.end_at_step} of {steps} steps; "
                "no step lies between",
                f"Set a start below the end, and below {steps}",
            )
        part = list(sigmas[self.start_at_step : end + 1])
        if end < steps and not self.return_with_leftover_noise:
            part[-1] = 0.0
        return part


def check_sigmas(sigmas: Sequence[float]) -> None:
    """Whether numbers are a schedule of a flow model.

    Raises:
        Refusal: too few, no numbers, not falling, or outside [0, 1].
    """
    told = " ".join(f"{sigma:.4g}" for sigma in sigmas[:6]) + (" ..." if len(sigmas) > 6 else "")
    if len(sigmas) < 2:
        raise Refusal(
            f"sigmas holds {len(sigmas)} numbers; a step needs two", "Connect a scheduler of the host"
        )
    if any(map(math.isnan, sigmas)):
        raise Refusal(
            f"sigmas are {told}; one is no number",
            "Take more steps or another scheduler; kl_optimal has none for a single step",
        )
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise Refusal(
            f"sigmas are {told}; Wan2.1 is a flow model, whose noise levels lie between 1 and 0",
            "Give the scheduler node the MODEL that is sampled",
        )
    if not all(a > b for a, b in pairwise(sigmas)):
        raise Refusal(
            f"sigmas are {told}; each must be below the one before",
            "Connect them from the noisiest to the cleanest",
        )


def _check_schedule(steps: int, shift: float, solver: str) -> None:
    _check_solver(solver)
    if not (isinstance(steps, int) and steps >= 1):
        raise Refusal(f"steps is {steps!r}; it must be a whole number from 1 up", "Wan2.1 uses 30 to 50")
    if not 0.001 <= shift <= 1000:
        raise Refusal(f"shift is {shift!r}; it must be above 0 (0.001 to 1000)", "Wan2.1 uses 3 to 16")


def _check_solver(solver: str) -> None:
    if solver not in FIRST_SIGMA:
        raise Refusal(f"solver is {solver!r}; it is not one we have", f"Use one of {', '.join(FIRST_SIGMA)}")
