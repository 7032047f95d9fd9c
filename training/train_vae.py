"""Train the bundled VAE: the best linear code, then pictures and clips, then its scaling folded in.

    python training/train_vae.py            # about 45 minutes on two CPU cores; killed, it goes on

It is `wan.vae.WanVAE` itself that is trained. Stages, in the work folder: vae_start (`linear_start.py`),
vae_video and vae (folded, ready for use). `train_decoder.py` goes on from there.

    B batch    F pixel frames    T latent frames    H W height, width
"""

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "scripts")  # in place of this folder

from lib import pack

pack.load_pack()

from wan21.training import data  # noqa: E402
from wan21.training.linear_start import per_channel, start_linear  # noqa: E402
from wan21.training.optim import MuonAdamW, warm_up_then_decay  # noqa: E402
from wan21.training.progress import WORK, Parts, Stage, keep_to_one_size, train, work_of  # noqa: E402
from wan21.training.vae_stream import decode, encode  # noqa: E402
from wan21.wan.vae import WanVAE  # noqa: E402

SEEDS = {
    "vae_video": 2 * 10**8,
    "vae_refined": 3 * 10**8,
    "fold": 4 * 10**8,
    "weigh": 45 * 10**7,
}
LATENT_NOISE = 0.15  # largest, of latents of unit variance: what the DiT gets wrong must not show
PIXEL_POWER = 0.7  # of the pixels' change, in a latent direction's variance; 0 leaves all directions alike
LOG_VARIANCE = -8.0  # of every latent; training leaves it alone and nobody reads it
# Wan2.1's own mean and standard deviation of each latent channel, which every user of its latents divides by.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
AS_VECTORS = ("encoder.conv1.*", "decoder.head.2.*")  # AdamW's: pixels on one side
# Batch, frames, height, width; how often. Small ones mostly, some large and long so that those hold as well.
# On the CPU torch runs a 3D convolution ten times slower if B C F H is at most 20480.
SIZES = {
    (3, 9, 48, 48): 16, (2, 9, 64, 64): 26, (2, 17, 48, 64): 4, (2, 17, 64, 64): 12, (5, 5, 64, 64): 4,
    (2, 5, 96, 96): 6, (1, 9, 96, 96): 6, (2, 9, 96, 64): 3, (2, 9, 64, 96): 2, (1, 33, 64, 64): 3,
    (1, 9, 128, 128): 10, (1, 17, 128, 128): 3, (8, 1, 64, 64): 20, (4, 1, 96, 96): 5, (2, 1, 128, 128): 6,
}  # fmt: skip


@dataclass(frozen=True)
class Schedule:
    """How long and how fast; `batch` multiplies the batch sizes above."""

    video_steps: int
    refine_steps: int
    batch: int
    video_lr: float = 2e-4  # 1e-3 undoes what the start has within ten steps
    refine_lr: float = 3e-4
    dim: int = 16


CPU = Schedule(video_steps=7200, refine_steps=2000, batch=1)
CUDA = Schedule(video_steps=4000, refine_steps=2000, batch=8)  # never run, see README


class LatentNorm(nn.Module):
    """Latents of zero mean and unit variance by running statistics (batch renormalization).

    Sergey Ioffe, arXiv:1702.03275. Plain batch statistics would hide a small batch's brightness from the
    decoder; their gradient is kept, as it takes the encoder's incentive to outgrow the noise.
    """

    def __init__(self, channels=16, momentum=0.01):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, z):
        if not self.training:
            return (z - per_channel(self.mean)) / per_channel(self.var.sqrt())
        var, mean = torch.var_mean(z, (0, 2, 3, 4), correction=0)
        self.steps += 1
        share = max(self.momentum, 1 / float(self.steps))  # the first batch sets them
        self.mean.lerp_(mean.detach(), share)
        self.var.lerp_(var.detach(), share)
        std, running = (var + 1e-6).sqrt(), self.var.sqrt()
        scale = (std.detach() / running).clamp(1 / 3, 3)
        shift = ((mean.detach() - self.mean) / running).clamp(-3, 3)
        return (z - per_channel(mean)) / per_channel(std) * per_channel(scale) + per_channel(shift)


@torch.no_grad()
def initialize(vae, seed=0):
    """Orthogonal weights that look at the newest frame only, and no biases; `start_linear` goes on there."""
    torch.manual_seed(seed)
    for module in vae.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            nn.init.zeros_(module.bias)
            weight = torch.zeros_like(module.weight)
            newest = weight[:, :, -1] if weight.ndim == 5 else weight
            newest.copy_(nn.init.orthogonal_(torch.empty_like(newest)))
            module.weight.copy_(weight)


def draw_size(sizes, step):
    return random.Random(step).choices([*sizes], [*sizes.values()])[0]


def training_clip(seed, size, batch, device):
    """A batch in [-1, 1]; in one of twenty, all but the first frame is grey, as in the DiT's conditioning."""
    count, *shape = size
    video = data.clips(seed, count * batch, *shape, device=device)[0]
    if seed % 20 == 0:
        video[:, :, 1:] = 0
    return video


def reconstruction_loss(output, target):
    """L1 + MSE / 2 + L1 of the differences of neighbouring pixels / 2."""
    error = output - target
    edges = (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return error.abs().mean() + 0.5 * error.square().mean() + 0.5 * edges


def with_noise(z):
    """Up to LATENT_NOISE of noise, as much as the draw for each clip says."""
    return z + torch.randn_like(z) * LATENT_NOISE * torch.rand(len(z), 1, 1, 1, 1, device=z.device)


def autoencode(vae, norm, video):
    z = norm(encode(vae, video))
    return decode(vae, with_noise(z) if norm.training else z)


def train_video(stage, vae, norm, schedule):
    """vae and norm together, from where they are or where the stage was left."""
    device, lr, steps = norm.mean.device, schedule.video_lr, schedule.video_steps
    optimizer = MuonAdamW(vae.named_parameters(), lr, 0.4 * lr, adam=AS_VECTORS)

    def step_at(step):
        torch.manual_seed(SEEDS[stage.name] + step)
        video = training_clip(SEEDS[stage.name] + step, draw_size(SIZES, step), schedule.batch, device)
        norm.train()
        loss = reconstruction_loss(autoencode(vae, norm, video), video)
        loss.backward()
        scale = warm_up_then_decay(step, steps, warm_up=100, hold=0.2, last=0.03)
        return {"loss": loss.item(), "gradient": optimizer.step(scale), "lr": scale * lr}

    parts = Parts(vae=vae, norm=norm, optimizer=optimizer)
    train(stage, parts, steps, step_at, lambda: evaluate_vae(vae, norm), measure_every=400)


@torch.no_grad()
def fold(vae, norm, seed=SEEDS["fold"], batches=64):
    """Builds the scaling into the weights, exactly: Wan2.1's mean and std now standardize the latents.

    The decoder goes on seeing what it was trained on, by the running statistics: with measured ones in their
    place clips had 1.7 dB less. Those of the latents it gives are measured.
    """
    norm.eval()
    device = norm.mean.device
    raw = torch.cat([raw_latents(vae, seed + i, device) for i in range(batches)], 1)  # [16, n]
    std, mean = torch.std_mean(raw, 1)
    wan_mean, wan_std = (torch.tensor(v, device=device) for v in (LATENT_MEAN, LATENT_STD))
    z_dim = vae.z_dim
    means, log_variances = slice(z_dim), slice(z_dim, None)
    # encoder: out = (raw - mean) / std * wan_std + wan_mean
    gain = wan_std / std
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[means] *= gain[:, None, None, None, None]
    bias[means] = (bias[means] - mean) * gain + wan_mean
    weight[log_variances], bias[log_variances] = 0, LOG_VARIANCE
    # decoder: in = (raw - norm.mean) / norm.std, and raw = (out - wan_mean) / gain + mean
    norm_std = norm.var.sqrt()
    scale, shift = 1 / (gain * norm_std), (mean - wan_mean / gain - norm.mean) / norm_std
    weight, bias = vae.conv2.weight, vae.conv2.bias
    bias += weight[:, :, 0, 0, 0] @ shift
    weight *= scale[None, :, None, None, None]


@torch.no_grad()
def weigh_by_pixels(vae, seed=SEEDS["weigh"], batches=6, power=PIXEL_POWER):
    """Builds a change of basis into the weights, exactly: what matters to pixels varies more in the latents.

    As trained, every channel has the same variance, whatever it does to the picture: a DiT, whose loss is
    even over the channels, would spend most of it on detail that hardly shows. Afterwards a direction's
    variance follows the change of the pixels that it makes; and all channels mix all directions, so that
    each of them still has Wan2.1's mean and std. Decoded pixels stay the same.
    """
    device = vae.conv1.weight.device
    std, mean = (torch.tensor(v, device=device) for v in (LATENT_STD, LATENT_MEAN))
    latents = [vae.encode(data.clips(seed + i, 4, device=device)[0]) for i in range(batches)]
    metric = sum(pixel_metric(vae, z, seed) for z in latents) / batches
    flat = torch.cat([standardized(z).transpose(0, 1).flatten(1) for z in latents], 1)
    values, axes = torch.linalg.eigh(metric.double())
    root = axes @ torch.diag(values.clamp_min(1e-6) ** (power / 2)) @ axes.T
    _, turned = torch.linalg.eigh(root @ torch.cov(flat.double()) @ root)
    change = hadamard(len(std)).to(turned) @ turned.T @ root  # all channels: the same variance
    change = change.float() / (change.float() @ flat).std(1, keepdim=True)
    shift = (change @ flat).mean(1)
    # of raw latents: z -> matrix z + offset
    matrix = std[:, None] * change / std
    offset = mean - matrix @ mean - std * shift
    means = slice(vae.z_dim)
    weight, bias = vae.conv1.weight, vae.conv1.bias
    weight[means] = (matrix @ weight[means].flatten(1)).view_as(weight[means])
    bias[means] = matrix @ bias[means] + offset
    back = torch.linalg.inv(matrix.double()).float()
    weight, bias = vae.conv2.weight, vae.conv2.bias
    weight.copy_((weight.flatten(1) @ back).view_as(weight))
    bias -= weight.flatten(1) @ offset


def pixel_metric(vae, z, seed, size=0.1):
    """[16, 16]: by how much the pixels change, per latent pixel, with a little noise in each channel."""
    generator = torch.Generator(z.device).manual_seed(seed)
    noise = size * torch.randn(z[:, :1].shape, generator=generator, device=z.device)
    plain = vae.decode(z)
    changes = []
    for channel, std in enumerate(LATENT_STD):
        moved = z.clone()
        moved[:, channel] += std * noise[:, 0]
        changes.append((vae.decode(moved) - plain).flatten() / size)
    changes = torch.stack(changes)
    return changes @ changes.T / noise.numel()


def hadamard(size):
    """Orthogonal [size, size] of entries of one size; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / size**0.5


def raw_latents(vae, seed, device):
    """Latents [16, n] of four clips."""
    return vae.encode(data.clips(seed, 4, device=device)[0]).transpose(0, 1).flatten(1)


def standardized(z):
    mean, std = (per_channel(torch.tensor(v, device=z.device)) for v in (LATENT_MEAN, LATENT_STD))
    return (z - mean) / std


@torch.no_grad()
def evaluate_vae(vae, norm=None, count=16, size=(17, 64, 64), seed=data.HELD_OUT):
    """PSNR in dB over held-out clips (the mean of each clip's): pictures alone, first frame, whole clip.

    Args:
        norm: of the training; None once it is folded in.
    """
    device = next(vae.parameters()).device
    rows = []
    for video in data.clips(seed, count, *size, device=device)[0].split(4):
        z = vae.encode(video)
        if norm is not None:
            z = norm.eval()(z)
        error = (vae.decode(z).clamp(-1, 1) - video).square()
        rows.append(torch.stack((error[:, :, 0].mean((1, 2, 3)), error.mean((1, 2, 3, 4)))))
    first, clip = (-10 * (torch.cat(rows, 1) / 4).log10()).mean(1).tolist()
    return {"first_frame_psnr": first, "clip_psnr": clip}


def start(stage, schedule, device):
    """The VAE before any training, and the norm of its latents."""
    vae = WanVAE(dim=schedule.dim, device=device)
    norm = LatentNorm(vae.z_dim).to(device)
    parts = Parts(vae=vae, norm=norm)
    if not stage.done:
        initialize(vae)
        start_linear(vae, norm)
        stage.log(step=0, **evaluate_vae(vae, norm))
        stage.save({"parts": parts.state_dict()}, done=True)
    parts.load_state_dict(stage.load(device)["parts"])
    return vae, norm


def train_vae(work=WORK, schedule=CPU, device="cpu"):
    """All of it up to the folded VAE, which is returned; what is done already is loaded."""
    if not Stage(work, "vae").done:
        vae, norm = start(Stage(work, "vae_start"), schedule, device)
        train_video(Stage(work, "vae_video"), vae, norm, schedule)
        folded = Stage(work, "vae")  # its clock begins here
        fold(vae, norm)
        weigh_by_pixels(vae)
        folded.log(**evaluate_vae(vae))
        folded.save({"vae": vae.state_dict()}, done=True)
    return load_vae(work, schedule, device, refined=False)


def load_vae(work=WORK, schedule=CPU, device="cpu", refined=True):
    """The VAE ready for use: the refined one if that is wanted and finished."""
    vae = WanVAE(dim=schedule.dim, device=device)
    stage = Stage(work, "vae_refined")
    if refined and stage.done:
        vae.load_state_dict(stage.load(device)["parts"]["vae"])
    else:
        vae.load_state_dict(Stage(work, "vae").load(device)["vae"])
    return vae.eval()


def main():
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the stages; default: as of train.py")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work = args.work or work_of(device)
    keep_to_one_size(work, device)
    train_vae(work, CUDA if device == "cuda" else CPU, device)


if __name__ == "__main__":
    main()
