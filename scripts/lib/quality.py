"""How like two videos are."""

import math

import torch
import torch.nn.functional as F

WINDOW, WIDTH = 11, 1.5  # pixels: of SSIM's Gaussian, its side and its standard deviation


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """The peak signal-to-noise ratio of pixels in [0, 1], in dB; infinite between equal ones."""
    error = (a - b).square().mean().item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """The structural similarity of videos [F, H, W, 3] in [0, 1], after Wang et al. 2004."""
    at = torch.arange(WINDOW, device=a.device) - WINDOW // 2
    window = torch.exp(-at.square() / (2 * WIDTH**2))
    window = torch.outer(window, window)
    window = (window / window.sum()).expand(3, 1, WINDOW, WINDOW)
    a, b = (v.permute(0, 3, 1, 2).float() for v in (a, b))  # [F, 3, H, W]

    def mean(x):
        return F.conv2d(x, window, groups=3)

    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = 0.01**2, 0.03**2
    return ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean().item()
