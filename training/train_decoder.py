"""Train the bundled VAE's decoder once more, long and at the sizes that people look at.

    python training/train_decoder.py   # the file in models/, which is written at the end; killed, it goes on

The encoder is left alone, so latents made so far, the DiT and the LoRAs stay valid. `make train-tiny` does
the same as its stage vae_refined.

    B batch    F pixel frames    H W height, width
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1] / "scripts")  # in place of this folder

from lib import bundled, pack

pack.load_pack()

from wan21.training import data, metrics, train_vae  # noqa: E402
from wan21.training.files import commit, stored, write  # noqa: E402
from wan21.training.optim import MuonAdamW, warm_up_then_decay  # noqa: E402
from wan21.training.progress import WORK, Parts, Stage, train  # noqa: E402
from wan21.training.vae_stream import decode, encode  # noqa: E402
from wan21.wan.vae import WanVAE  # noqa: E402

# Batch, frames, height, width; how often. Half of the pixels are of sides of 96 and 128, which the stages
# before hardly saw.
SIZES = {
    (2, 9, 64, 64): 20, (1, 17, 64, 64): 6, (2, 5, 64, 96): 6, (1, 9, 96, 96): 12, (1, 5, 128, 128): 10,
    (1, 9, 128, 96): 4, (1, 1, 128, 128): 3,
}  # fmt: skip
LATENT_NOISE = 0.5  # of what the encoder was trained with; the DiT has become better than that
FLICKER = 0.25  # weight of the differences between frames in the loss
MEASURED = (3, 17, 128, 128)  # held-out clips, frames, height, width


def decoder_loss(output, target):
    """`reconstruction_loss`, more of its square, and what is added between one frame and the next."""
    error = output - target
    loss = train_vae.reconstruction_loss(output, target) + 0.5 * error.square().mean()
    if error.shape[2] > 1:
        loss = loss + FLICKER * error.diff(dim=2).abs().mean()
    return loss


def refine(stage, vae, schedule):
    """Trains the decoder of a folded VAE in place, from where it is or where the stage was left."""
    device = next(vae.parameters()).device
    learning = nn.ModuleDict({"conv2": vae.conv2, "decoder": vae.decoder})
    lr, steps = schedule.refine_lr, schedule.refine_steps
    optimizer = MuonAdamW(learning.named_parameters(), lr, 0.4 * lr, train_vae.AS_VECTORS)
    std = train_vae.per_channel(torch.tensor(train_vae.LATENT_STD, device=device))

    def step_at(step):
        seed = train_vae.SEEDS[stage.name] + step
        torch.manual_seed(seed)
        video = train_vae.training_clip(seed, train_vae.draw_size(SIZES, step), schedule.batch, device)
        with torch.no_grad():
            z = encode(vae, video)
        z = z + train_vae.with_noise(torch.zeros_like(z)) * LATENT_NOISE * std
        loss = decoder_loss(decode(vae, z), video)
        loss.backward()
        scale = warm_up_then_decay(step, steps, warm_up=50, hold=0.2, last=0.02)
        return {"loss": loss.item(), "gradient": optimizer.step(scale), "lr": scale * lr}

    train(stage, Parts(vae=vae, optimizer=optimizer), steps, step_at, lambda: quality_of(vae))


@torch.no_grad()
def quality_of(vae, seed=data.HELD_OUT):
    """`metrics.quality` of held-out clips of the size `MEASURED`."""
    device = next(vae.parameters()).device
    count, *size = MEASURED
    pairs = []
    for i in range(count):
        video = data.clips(seed + i, 1, *size, device=device)[0]
        decoded = vae.decode(vae.encode(video)).clamp(-1, 1)
        pairs.append([(v[0].transpose(0, 1) + 1) / 2 for v in (decoded, video)])
    return metrics.quality(pairs)


def shipped(path):
    """The VAE of a file in `models/`."""
    weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    vae = WanVAE(dim=len(weights["decoder.head.0.gamma"]))
    vae.load_state_dict(weights)
    return vae


def rewrite(path, vae, seconds):
    """Puts the weights into the file, which keeps what its metadata says of how it was made."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    spent = json.loads(metadata["training_seconds"])
    spent["vae_refined"] = spent.get("vae_refined", 0) + seconds
    metadata |= {"training_seconds": json.dumps(spent), "training_commit": commit()}
    write(stored(vae.state_dict()), path, metadata)


def main():
    """Read the command line, train, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--vae", type=Path, default=bundled.MODELS / "vae" / bundled.VAE, help="trained on")
    parser.add_argument("--work", type=Path, default=WORK.with_name("train_decoder"), help="folder")
    parser.add_argument("--steps", type=int, help="default: the schedule's")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = train_vae.CUDA if device == "cuda" else train_vae.CPU
    if options.steps:
        schedule = replace(schedule, refine_steps=options.steps)
    vae, stage = shipped(options.vae).to(device), Stage(options.work, "vae_refined")
    print("before", quality_of(vae), flush=True)
    refine(stage, vae, schedule)
    rewrite(options.vae, vae, round(stage.spent))
    print("after", quality_of(vae))


if __name__ == "__main__":
    main()
