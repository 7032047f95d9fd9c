"""The diffusion transformer and its text encoder, trained together to turn noise into the cached clips.

Rectified flow: x = (1 - sigma) clip + sigma noise, and the model learns noise - clip.
"""

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from ..wan.config import PATCH_SIZE
from ..wan.device import multiplies_in_bf16
from . import captions, data, dit, latents
from .optim import Average, MuonAdamW, bf16_products, warm_up_then_decay
from .progress import Parts, train
from .text import TextEncoder, train_tokenizer

# Matrices that AdamW trains: first and last layers, embeddings, and what has the axis of a table.
BY_ADAM = (
    "*patch_embedding.weight",
    "*head.head.weight",
    "*modulation",
    "*shared.weight",
    "*relative_attention_bias.weight",
)
SIGMA_MEAN, SIGMA_STD, UNIFORM = 0.8, 1.0, 0.15  # logit-normal, as SD3; a part of all is even
SIGMA_TOKENS = 80  # that mean's; a clip of n tokens hides at noise higher by the factor sqrt(n / 80), as SD3
SIGMA_EMPTY = 1.5  # added to the mean of clips without an image: all of them is decided in the noise
DROP_CAPTION = 0.1
PLAIN_CAPTION = 0.5  # of the rest: the shortest wording, from which the others are learnt
HELD_OUT_CLIPS = 96


@dataclass(frozen=True)
class Schedule:
    """How much of everything.

    Attributes:
        tokens: size of a batch (80 are 17 frames of 64x64).
        hold: part of all steps before the learning rate falls.
        late: part of all steps before clips are drawn by `latents.LATE_KINDS`.
    """

    clips: int
    steps: int
    tokens: int
    lr_muon: float = 3e-3
    lr_adam: float = 1.5e-3
    hold: float = 0.4
    late: float = 0.9
    average: float = 0.998
    measure_every: int = 200


SCHEDULES = {
    "smoke": Schedule(clips=40, steps=6, tokens=160, measure_every=3),  # whether it runs at all
    "cpu": Schedule(clips=5200, steps=24_000, tokens=32 * 80),
    "cuda": Schedule(clips=40_000, steps=6000, tokens=256 * 80, average=0.999),
}


class TinyModel(torch.nn.Module):
    """DiT and text encoder, so that one optimizer, average and state hold both."""

    def __init__(self, tokenizer):
        super().__init__()
        self.dit = dit.build()
        self.text = TextEncoder(tokenizer)

    def forward(self, x, sigma, condition, texts):
        return dit.velocity(self.dit, x, sigma, condition, *self.text(texts))


def tokenizer_of(work):
    """The tokenizer's bytes; trained once per training, since the embeddings belong to its pieces."""
    path = Path(work) / "spiece.model"
    if not path.exists():
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(train_tokenizer())
        unfinished.rename(path)
    return path.read_bytes()


def encode_stage(stage, vae, schedule, device="cpu"):
    """Write the cached latents: `<work>/latents`, held-out ones in `<work>/latents_held_out`."""
    if stage.done:
        return
    encoder = latents.Encoder(vae, device, fast=True)
    stage.load()

    def on_shard(done, total):
        if done % 10 == 0 or done == total:
            stage.log(step=done, of=total)
            stage.save({})

    latents.write_shards(encoder, stage.work / "latents_held_out", held_out_plan())
    latents.write_shards(encoder, stage.work / "latents", latents.shard_plan(schedule.clips), on_shard)
    stage.save({}, done=True)


def held_out_plan(clips=HELD_OUT_CLIPS):
    return latents.shard_plan(clips, latents.HELD_OUT_BUCKETS, data.HELD_OUT)


def dit_stage(stage, schedule, device="cpu"):
    """Train DiT and text encoder on the cached latents; the state's `average` holds the result."""
    if stage.done:
        return
    clips = latents.Latents(stage.work / "latents", latents.shard_plan(schedule.clips))
    model = TinyModel(tokenizer_of(stage.work)).to(device)
    optimizer = MuonAdamW(
        model.named_parameters(),
        schedule.lr_muon,
        schedule.lr_adam,
        adam=BY_ADAM,
        weight_decay=0.02,
        iterations=4,
        in_bf16=multiplies_in_bf16(device),
    )
    average = Average(model, schedule.average)
    held_out = HeldOut(stage.work / "latents_held_out", held_out_plan(), device)

    def do_step(step):
        rng = random.Random(f"dit {step}")
        late = step >= schedule.late * schedule.steps
        kinds = latents.LATE_KINDS if late else latents.KINDS
        clip, condition, motions = clips.draw(rng, schedule.tokens, kinds)
        texts = random_captions(motions, rng)
        sigma = random_sigmas(rng, len(clip), sigma_shift(clip, condition))
        with bf16_products(device):
            loss = flow_loss(model, clip.to(device), condition.to(device), texts, sigma, step)
        loss.backward()
        norm = optimizer.step(warm_up_then_decay(step, schedule.steps, 50, schedule.hold))
        average.update()
        return {"loss": loss.item(), "norm": norm}

    def measure():
        with average.applied():
            return {"held_out": held_out.loss(model)}

    parts = Parts(model=model, optimizer=optimizer, average=average)
    train(stage, parts, schedule.steps, do_step, measure, log_every=20, measure_every=schedule.measure_every)


def random_captions(motions, rng):
    return [random_caption(motion, rng) for motion in motions]


def random_caption(motion, rng):
    if rng.random() < DROP_CAPTION:
        return captions.unconditional(rng)
    return captions.canonical(motion) if rng.random() < PLAIN_CAPTION else captions.caption(motion, rng)


def sigma_shift(clip, condition):
    """What is added to the mean of each clip's noise level, [B]: the motion of a large one is decided
    earlier, and of one without an image earlier still."""
    tokens = clip[0, 0].numel() / math.prod(PATCH_SIZE)
    empty = condition[:, :4].flatten(1).amax(1) == 0
    return 0.5 * max(0.0, math.log(tokens / SIGMA_TOKENS)) + SIGMA_EMPTY * empty


def random_sigmas(rng, count, shift=0.0):
    normal = torch.tensor([rng.gauss(SIGMA_MEAN, SIGMA_STD) for _ in range(count)]) + shift
    even = torch.tensor([rng.random() for _ in range(count)])
    return torch.where(torch.tensor([rng.random() < UNIFORM for _ in range(count)]), even, normal.sigmoid())


def flow_loss(model, clip, condition, texts, sigma, seed):
    """Mean squared error of the velocity; `seed` is the noise's."""
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed)).to(clip)
    sigma = sigma.to(clip)
    share = sigma[:, None, None, None, None]
    x = (1 - share) * clip + share * noise
    return (model(x, sigma, condition, texts) - (noise - clip)).square().mean()


class HeldOut:
    """Loss on clips that were never trained on: even noise levels, plain prompts, a start image."""

    def __init__(self, folder, plan, device, batch=24):
        clips, self.device = latents.Latents(folder, plan), device
        self.batches = []
        for bucket in clips.buckets:
            count = max(1, batch * 80 // bucket.tokens)
            rows = range(len(clips.motions[bucket]))
            for start in range(0, len(rows), count):
                part = [*rows[start : start + count]]
                self.batches.append(clips.batch(bucket, part, ["start"] * len(part)))

    @torch.no_grad()
    def loss(self, model):
        total, count = 0.0, 0
        for i, (clip, condition, motions) in enumerate(self.batches):
            sigma = (torch.arange(len(clip)) + 0.5) / len(clip)
            texts = [captions.canonical(motion) for motion in motions]
            loss = flow_loss(model, clip.to(self.device), condition.to(self.device), texts, sigma, i)
            total, count = total + loss.item() * len(clip), count + len(clip)
        return total / count


def averaged_model(stage):
    """The trained model with its averaged weights, for the LoRA and the export."""
    model = TinyModel(tokenizer_of(stage.work)).requires_grad_(False)
    for parameter, average in zip(model.parameters(), stage.load()["parts"]["average"]["weights"]):
        parameter.copy_(average)
    return model
