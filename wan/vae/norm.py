"""The VAE's norm, and the activation after it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Scales each pixel's channel vector to length sqrt(C), then by `gamma`; [B, C, ...] -> the same shape.

    Args:
        dim: C.
        spatial_dims: axes after C.
    """

    def __init__(
        self,
        dim: int,
        spatial_dims: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * spatial_dims, device=device, dtype=dtype))

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        # For a vector near zero the scale exceeds what float16 holds, and inf * 0 would be NaN.
        largest = torch.finfo(x.dtype).max
        scale = (self.scale / length.clamp_min(1e-12)).clamp_max(largest).to(x)
        gamma = self.gamma.to(x)
        return x.mul_(scale).mul_(gamma) if in_place else x * scale * gamma


def norm_silu(norm: RMSNorm, x: Tensor, in_place: bool = False) -> Tensor:
    """silu(norm(x)), in the memory of x with `in_place`."""
    return F.silu(norm(x, in_place), inplace=in_place)
