"""In which colour each latent pixel of the bundled VAE shows, for the previews of a run.

The sampler has the DiT and not the VAE, so the DiT's file carries it.
"""

import torch
from wan21.host.progress import with_neighbours
from wan21.wan.config import VAE_STRIDE

from . import data
from .train_vae import standardized

SEED = data.HELD_OUT + 9 * 10**6
CLIPS = 48


@torch.no_grad()
def measure(vae):
    """Least squares from latents to the mean colour of the pixels that each stands for.

    Returns:
        (`factors`, 16 * 9 rows [r, g, b], and `bias`, for normalised latents and pixels in [-1, 1]; share of
        the colours' variance that they explain). Without a latent pixel's neighbours it would be half.
    """
    rows, colours = [], []
    for i in range(0, CLIPS, 4):
        video = data.clips(SEED + i, 4, 9)[0]
        z = with_neighbours(standardized(vae.encode(video)))  # [B, 144, T, h, w]
        pixels = torch.cat((video[:, :, :1].expand(-1, -1, 3, -1, -1), video), 2)  # the first stands for four
        mean = torch.nn.functional.avg_pool3d(pixels, VAE_STRIDE)
        rows.append(torch.cat((z, torch.ones_like(z[:, :1])), 1).movedim(1, -1).flatten(0, 3))
        colours.append(mean.movedim(1, -1).flatten(0, 3))
    rows, colours = torch.cat(rows).double(), torch.cat(colours).double()
    factors = torch.linalg.lstsq(rows, colours).solution
    left = (rows @ factors - colours).square().sum() / (colours - colours.mean(0)).square().sum()
    *factors, bias = [[round(value, 5) for value in row] for row in factors.tolist()]
    return {"factors": factors, "bias": bias}, 1 - float(left)
