"""Two velocities, and CFG-Zero* written out."""

import numpy as np
import torch


def random_velocities():
    """(with the prompt, without), of three samples."""
    g = torch.Generator().manual_seed(0)
    cond = torch.randn(3, 16, 2, 4, 6, generator=g)
    return cond, 0.6 * cond + 0.5 * torch.randn(cond.shape, generator=g)


def authors_formula(cond, uncond, scale):
    """Sample by sample in float64, after the paper's text."""
    samples = []
    for c, u in zip(cond.double().numpy(), uncond.double().numpy()):
        s = np.vdot(c, u) / (np.vdot(u, u) + 1e-8)
        samples.append(s * u * (1 - scale) + scale * c)
    return torch.from_numpy(np.stack(samples))
