"""A LoRA that lets the bundled model do with four steps without guidance, distilled from the model itself.

The teacher is the model in `models/` as the graph `quick_start` runs it: UniPC, guidance 2, shift 3. From one
noise it leads to one clip, on a path through the student's noise levels. The student, the same weights and a
LoRA, takes its four Euler steps at shift 5 from the same noise; what is trained on is how far it is from the
teacher's path after each of them. Every step starts where the student's own last one ended, and the gradient
goes back through all four, so a step learns to mend what those before it did, and errors do not add up.

    B clips    T latent frames    h w latent size    S the student's steps
"""

import hashlib
import random
from dataclasses import dataclass
from itertools import pairwise

import torch
from lib import bundled
from safetensors.torch import load_file

from ..wan.conditioning import known_mask
from ..wan.sigmas import flow_sigmas
from ..wan.solvers import SOLVERS, solve
from ..wan.vae import WanVAE
from . import data, dit, latents
from .files import write_text
from .latents import WITH_END
from .optim import MuonAdamW, bf16_products, warm_up_then_decay
from .progress import Parts, Stage, train
from .train_dit import TinyModel, random_captions
from .train_lora import TARGETS, Lora

STEPS, SHIFT = 4, 5.0  # as the 4-step LoRAs of the large models
TEACHER_GUIDANCE, TEACHER_SHIFT, NEGATIVE = 2.0, 3.0, ""  # of the graph quick_start
# The teacher's steps within each of the student's: 16 in all, since its own 20 do not stop there. What they
# lead to differs from what the 20 do by 43 dB, and those from 100 steps by 30 dB.
TEACHER_STEPS = (2, 2, 4, 8)
RANK = 32
# Beside what every LoRA of the project changes: what tells the model the noise level, and its last layer.
MORE_TARGETS = r"|time_embedding\.[02]|time_projection\.1|head\.head"
FIRST_SEED = 6 * 10**8
WITHOUT_IMAGE = 12  # one clip in so many has no image; as many as in `latents` have an end image


@dataclass(frozen=True)
class Schedule:
    """How much of everything; `tokens` is the size of a batch (80 are 17 frames of 64x64)."""

    clips: int
    held_out: int
    steps: int
    tokens: int
    learning_rate: float = 1e-3
    measure_every: int = 50


SCHEDULES = {
    "smoke": Schedule(clips=20, held_out=4, steps=4, tokens=160, measure_every=2),
    "full": Schedule(clips=1200, held_out=64, steps=500, tokens=10 * 80),
}


class Velocity:
    """Asks the model: what the student is told, and the teacher with its guidance.

    Args:
        condition: [B, 4 + 16, T, h, w].
    """

    def __init__(self, model, condition, texts):
        self.model, self.condition = model, condition
        with torch.no_grad():
            self.text, self.negative = model.text(texts), model.text([NEGATIVE] * len(texts))

    def __call__(self, x, sigma):
        return self._of(x, sigma, self.text)

    def guided(self, x, sigma):
        return self._of(x, sigma, self.negative).lerp(self(x, sigma), TEACHER_GUIDANCE)

    def _of(self, x, sigma, text):
        with bf16_products(x.device):
            return dit.velocity(self.model.dit, x, x.new_full([len(x)], sigma), self.condition, *text).float()


def student_sigmas():
    return flow_sigmas(STEPS, SHIFT, "euler")


def roll_out(velocity, noise):
    """The student's latents after each of its steps, S of [B, 16, T, h, w]."""
    x, states = noise, []
    for sigma, sigma_next in pairwise(student_sigmas()):
        x = x + (sigma_next - sigma) * velocity(x, sigma)
        states.append(x)
    return states


def teacher_path(velocity, noise):
    """The teacher's latents at the student's noise levels and at 0, [S + 1, B, 16, T, h, w]."""
    stops, grid, at = student_sigmas(), [], []
    for (sigma, sigma_next), count in zip(pairwise(stops), TEACHER_STEPS, strict=True):
        at.append(len(grid))
        grid += between(sigma, sigma_next, count)
    states = []
    last = solve(
        SOLVERS["unipc"],
        velocity.guided,
        noise,
        [min(grid[0], 1 - 1e-4), *grid[1:], 0.0],
        lambda i, _x0, x: states.append(x) if i in at else None,
    )
    return torch.stack([*states, last])


def between(sigma, sigma_next, count):
    """`count` noise levels from `sigma` on, even as the teacher's schedule is."""
    start, end = (s / (TEACHER_SHIFT - (TEACHER_SHIFT - 1) * s) for s in (sigma, sigma_next))
    even = (start + (end - start) * i / count for i in range(count))
    return [TEACHER_SHIFT * s / (1 + (TEACHER_SHIFT - 1) * s) for s in even]


def path_loss(velocity, path):
    """Mean squared distance from the teacher's path after each step, over the step's length.

    By the length, so that each step's velocity counts as much as the way it is taken along.
    """
    ways = [a - b for a, b in pairwise(student_sigmas())]
    states = roll_out(velocity, path[0])
    return sum((x - aim).square().mean() / way for x, aim, way in zip(states, path[1:], ways, strict=True))


def conditions(encoder, bucket, video):
    """What the model is told of clips [B, 3, F, H, W]: mask and image latent [B, 4 + 16, T, h, w]."""
    size = (bucket.frames, bucket.height, bucket.width)
    first = video[:, :, :1]
    tail = encoder.tail(first, bucket.frames).expand(len(video), -1, -1, -1, -1)
    image = torch.cat([encoder.with_start(first, bucket.frames), tail], 2)
    mask = known_mask(*size).repeat(len(video), 1, 1, 1, 1)
    with_end = latents.grey_behind(first[::WITH_END], bucket.frames)
    with_end[:, :, -1:] = video[::WITH_END, :, -1:]
    image[::WITH_END], mask[::WITH_END] = encoder.latents(with_end), known_mask(*size, True)
    image[1::WITHOUT_IMAGE], mask[1::WITHOUT_IMAGE] = 0, 0
    return torch.cat([mask, image], 1)


@torch.no_grad()
def shard(model, encoder, bucket, count, seed):
    """Paths of the teacher on `count` clips, in half precision, with what the student needs to follow."""
    video, motions = data.clips(seed, count, bucket.frames, bucket.height, bucket.width)
    condition, texts = conditions(encoder, bucket, video), random_captions(motions, random.Random(seed))
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    paths = []
    for rows in torch.arange(count).split(max(1, 24 * 80 // bucket.tokens)):
        noise = torch.randn(len(rows), 16, *condition.shape[2:], generator=generator)
        velocity = Velocity(model, condition[rows].to(device), [texts[row] for row in rows])
        paths.append(teacher_path(velocity, noise.to(device)).cpu())
    return {"path": torch.cat(paths, 1).half(), "condition": condition.half(), "texts": texts}


def write_shards(model, encoder, folder, plan):
    """Make what is not there yet. A shard appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for done, (bucket, count, seed) in enumerate(plan):
        path = folder / f"{bucket.name}-{seed}.pt"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            torch.save(shard(model, encoder, bucket, count, seed), unfinished)
            unfinished.rename(path)
            print(f"{folder.name}: {done + 1} of {len(plan)} shards", flush=True)


def device_of(model):
    return next(model.parameters()).device


class Paths:
    """All shards of a plan in memory, and batches of one size of them, which go to a device."""

    def __init__(self, folder, plan, device):
        self.device = device
        parts = {}
        for bucket, _, seed in plan:
            parts.setdefault(bucket, []).append(torch.load(folder / f"{bucket.name}-{seed}.pt"))
        self.parts = {
            bucket: {
                "path": torch.cat([part["path"] for part in shards], 1),
                "condition": torch.cat([part["condition"] for part in shards]),
                "texts": [text for part in shards for text in part["texts"]],
            }
            for bucket, shards in parts.items()
        }

    def draw(self, rng, tokens):
        """(path [S + 1, B, 16, T, h, w], condition [B, 20, T, h, w], B texts) of about `tokens` tokens."""
        buckets = [*self.parts]
        bucket = rng.choices(buckets, [b.tokens * len(self.parts[b]["texts"]) for b in buckets])[0]
        every = range(len(self.parts[bucket]["texts"]))
        # At least two: of one clip the model takes its modulation and norm as one, with no mixed precision.
        return self.rows(bucket, rng.choices(every, k=max(2, tokens // bucket.tokens)))

    def rows(self, bucket, rows):
        part = self.parts[bucket]
        return (
            part["path"][:, rows].to(self.device).float(),
            part["condition"][rows].to(self.device).float(),
            [part["texts"][r] for r in rows],
        )

    def whole(self):
        """Every clip once, in batches."""
        for bucket, part in self.parts.items():
            for rows in torch.arange(len(part["texts"])).split(max(1, 24 * 80 // bucket.tokens)):
                yield self.rows(bucket, rows.tolist())


@torch.no_grad()
def nearness(model, paths):
    """How near the student's clips are to the teacher's from the same noise: dB of the latents."""
    error = power = 0.0
    for path, condition, texts in paths.whole():
        last = roll_out(Velocity(model, condition, texts), path[0])[-1]
        error += (last - path[-1]).square().sum().item()
        power += path[-1].square().sum().item()
    return 10 * torch.tensor(power / error).log10().item()


def bundled_model(models):
    """DiT and text encoder of the folder `models`, frozen."""
    text = load_file(models / "text_encoders" / bundled.TEXT_ENCODER)
    model = TinyModel(text.pop("spiece_model").numpy().tobytes())
    model.text.t5.load_state_dict(text)
    model.dit.load_state_dict(load_file(models / "diffusion_models" / bundled.MODEL))
    return model.requires_grad_(False).eval()


def bundled_encoder(models, device="cpu"):
    vae = WanVAE(dim=16)
    vae.load_state_dict(load_file(models / "vae" / bundled.VAE))
    return latents.Encoder(vae.eval(), device)


def student(model):
    return Lora(model.dit, RANK, targets=TARGETS.pattern + MORE_TARGETS)


def distil(work, models, schedule, device="cpu"):
    """Make the teacher's paths and train the LoRA; returns its tensors."""
    model = bundled_model(models)
    keep_to_one_teacher(work, model)
    model.to(device)
    plan = latents.shard_plan(schedule.clips, first_seed=FIRST_SEED)
    kept = latents.shard_plan(schedule.held_out, latents.HELD_OUT_BUCKETS, 3 * data.HELD_OUT)
    if not Stage(work, "distil").done:
        encoder = bundled_encoder(models, device)
        write_shards(model, encoder, work / "paths", plan)
        write_shards(model, encoder, work / "paths_held_out", kept)
    lora, stage = student(model).to(device), Stage(work, "distil")  # its clock begins behind the paths
    if not stage.done:
        paths = Paths(work / "paths", plan, device)
        held_out = Paths(work / "paths_held_out", kept, device)
        train_lora(stage, model, lora, paths, held_out, schedule)
    lora.load_state_dict(stage.load()["parts"]["lora"])
    return lora.to_file()


def keep_to_one_teacher(work, model):
    """A work folder belongs to one model: the paths of another would be followed without a word."""
    digest = hashlib.sha256()  # of the numbers: what a file says of itself differs with each commit
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    work.mkdir(parents=True, exist_ok=True)
    path = work / "teacher.txt"
    if not path.exists() and not (work / "paths").exists():
        write_text(path, digest.hexdigest())
    if not path.exists() or path.read_text() != digest.hexdigest():
        raise SystemExit(
            f"{work} holds the paths of another model; delete it, or give another folder with --work"
        )


def train_lora(stage, model, lora, paths, held_out, schedule):
    rate = schedule.learning_rate
    optimizer = MuonAdamW(lora.named_parameters(), rate, rate, adam=("*",))
    with lora.switched_off():
        print(f"without LoRA: {nearness(model, held_out):.2f} dB", flush=True)

    def do_step(step):
        path, condition, texts = paths.draw(random.Random(f"distil {step}"), schedule.tokens)
        loss = path_loss(Velocity(model, condition, texts), path)
        loss.backward()
        norm = optimizer.step(warm_up_then_decay(step, schedule.steps, hold=0.3))
        return {"loss": loss.item(), "norm": norm}

    def measure():
        return {"nearness": nearness(model, held_out)}

    parts = Parts(lora=lora, optimizer=optimizer)
    train(stage, parts, schedule.steps, do_step, measure, log_every=20, measure_every=schedule.measure_every)
