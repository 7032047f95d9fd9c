"""Sampling a part of a latent: what the mask leaves out stays on the given latent's own path of noise.

The rule of the host's k-diffusion samplers (`KSamplerX0Inpaint`), in terms of velocities.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Kept:
    """What a run leaves as it is.

    Attributes:
        latent: normalised, [B, 16, T, h, w].
        noise: of the run, standard normal, of the same shape.
        mask: of a noise level in (0, 1]: values in [0, 1] that broadcast to the latent; 1 is sampled, 0 kept.
    """

    latent: Tensor
    noise: Tensor
    mask: Callable[[float], Tensor]

    def around(self, velocity: Velocity) -> Velocity:
        """The velocity that leads to the latent where the mask is 0, and is the given one where it is 1."""

        def masked(x: Tensor, sigma: float) -> Tensor:
            mask = self.mask(sigma)
            seen = x * mask + (sigma * self.noise + (1 - sigma) * self.latent) * (1 - mask)
            v = velocity(seen, sigma)
            # To the clean estimate (seen - sigma * v) * mask + latent * (1 - mask), written so that a mask of
            # ones gives v bit by bit.
            return v * mask + (x - seen * mask - self.latent * (1 - mask)) / sigma

        return masked
