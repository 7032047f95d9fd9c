"""Clips as the DiT sees them: latents and what it is told of them, encoded once and kept in shards.

B clips    F pixel frames    T latent frames    H W pixels    h w latent size
"""

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from comfy.latent_formats import Wan21

from ..wan.conditioning import known_mask, latent_frames
from . import data, vae_stream

FIRST_SEED = 10**6
WARM_FRAMES = 5  # encoded of a start image and the grey behind it; later latents hardly know the image
WARM_LATENTS = latent_frames(WARM_FRAMES)
WITH_END = 2  # one clip in so many is also encoded with its last frame at the end of the grey
SHARD_PIXELS = 64 * 17 * 64 * 64
ENCODE_PIXELS = 8 * 17 * 64 * 64  # at once; more is not faster on a CPU

HARD = ("zoom", "rotate", "snow", "waves")  # learnt last: their content moves differently at each place
HARD_WEIGHT = 2.5  # how much more often such a clip is drawn
# Of a hundred clips, see `Latents.batch`. The late ones are those of the last steps: a given last frame is
# learnt last.
KINDS = {"alone": 18, "start": 36, "end": 30, "empty": 16}
LATE_KINDS = {"alone": 25, "start": 25, "end": 38, "empty": 12}
SHAPE_WEIGHT = 4.0  # how much more often a clip without an image is of a shape: what moves, its caption names

to_model = Wan21().process_in  # the host's own mean and standard deviation per channel


@dataclass(frozen=True)
class Bucket:
    """Clips of one size: a part `share` of all clips, of which a part `scenes` are scenes that change."""

    frames: int
    height: int
    width: int
    share: float
    scenes: float = data.SCENE_SHARE

    @property
    def tokens(self):
        return latent_frames(self.frames) * (self.height // 16) * (self.width // 16)

    @property
    def name(self):
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def pixels(self):
        return self.frames * self.height * self.width


BUCKETS = (
    Bucket(17, 64, 64, 0.23),
    Bucket(17, 96, 96, 0.1),
    Bucket(17, 128, 128, 0.19),
    Bucket(17, 64, 96, 0.05),
    Bucket(17, 96, 64, 0.05),
    # Of these there are few, and where flakes fall and waves run is another place in each size.
    Bucket(17, 80, 128, 0.06, scenes=1 / 4),
    Bucket(17, 128, 96, 0.03, scenes=1 / 4),
    Bucket(17, 128, 192, 0.01, scenes=1 / 3),
    Bucket(17, 192, 128, 0.01, scenes=1 / 3),
    Bucket(17, 192, 192, 0.03, scenes=1 / 3),
    Bucket(5, 64, 64, 0.03),
    Bucket(9, 64, 64, 0.05),
    Bucket(13, 64, 64, 0.05),
    Bucket(25, 64, 64, 0.04),
    Bucket(33, 64, 64, 0.03),
    Bucket(25, 96, 96, 0.02),
    Bucket(33, 96, 96, 0.01),
    Bucket(33, 128, 128, 0.01),
)
HELD_OUT_BUCKETS = (Bucket(17, 64, 64, 0.75), Bucket(17, 96, 96, 0.25))


def shard_plan(clips, buckets=BUCKETS, first_seed=FIRST_SEED):
    """(bucket, number of clips, seed) of each shard; the buckets' shards take turns."""
    plan = []
    for b, bucket in enumerate(buckets):
        total, size = max(1, round(clips * bucket.share)), max(1, SHARD_PIXELS // bucket.pixels)
        for i, start in enumerate(range(0, total, size)):
            plan.append((start / total, bucket, min(size, total - start), first_seed + 10_000 * b + i))
    return [part[1:] for part in sorted(plan, key=lambda part: part[0])]


class Encoder:
    """The trained VAE, on whole batches of clips, into the latent space of the model.

    Args:
        vae: `wan21.wan.vae.WanVAE` with the scaling folded in.
        change: of a batch of clips, before anything is encoded.
        fast: as the VAE is trained (`vae_stream.py`), in half the time where that is in bfloat16: latents are
            off by 1.4 % of their standard deviation, clips decoded from them by less than 0.1 dB.
    """

    def __init__(self, vae, device="cpu", change=lambda video: video, fast=False):
        self.vae, self.device, self.change = vae.to(device).eval(), device, change
        self.encode = vae_stream.encode if fast else whole
        self.tails = {}

    @torch.inference_mode()
    def latents(self, video):
        """[B, 3, F, H, W] in [-1, 1] -> normalised [B, 16, T, h, w] on the CPU."""
        count = max(1, (ENCODE_PIXELS if self.device == "cpu" else 8 * ENCODE_PIXELS) // video[0, 0].numel())
        parts = [self.encode(self.vae, part.to(self.device)) for part in video.split(count)]
        return to_model(torch.cat(parts)).cpu()

    def with_start(self, images, frames):
        """Latents of `images` [B, 3, 1, H, W] and then grey, as far as they depend on the image."""
        return self.latents(grey_behind(images, min(frames, WARM_FRAMES)))

    def tail(self, images, frames):
        """What follows: grey that has all but forgotten the image, as the mean over four images."""
        key = (frames, *images.shape[3:])
        if key not in self.tails:
            full = self.latents(grey_behind(images[:4], frames))
            self.tails[key] = full[:, :, WARM_LATENTS:].mean(0)  # [16, T - 2, h, w]
        return self.tails[key]

    def shard(self, bucket, count, seed):
        """Everything the DiT is trained with on `count` clips; half precision."""
        size = (bucket.frames, bucket.height, bucket.width)
        video, motions = data.clips(seed, count, *size, device=self.device, scenes=bucket.scenes)
        video = self.change(video)
        first, last = video[:, :, :1], video[:, :, -1:]
        with_end = grey_behind(first[::WITH_END], bucket.frames)
        with_end[:, :, -1:] = last[::WITH_END]
        tensors = {
            "clip": self.latents(video),  # [B, 16, T, h, w]
            "start": self.with_start(first, bucket.frames),  # [B, 16, 2, h, w]
            "tail": self.tail(first, bucket.frames),  # [16, T - 2, h, w]
            "end": self.latents(last),  # [B, 16, 1, h, w]
            "start_and_end": self.latents(with_end),  # [B / WITH_END, 16, T, h, w]
        }
        return {name: tensor.half() for name, tensor in tensors.items()} | {
            "motions": [vars(m) for m in motions]
        }


def whole(vae, video):
    """Latents of clips so small that streaming only costs time."""
    return vae.encode(video, chunk_frames=video.shape[2])


def grey_behind(images, frames):
    """[B, 3, 1, H, W] -> [B, 3, F, H, W]: the images and mid-grey, as `wan.conditioning.pixel_video`."""
    video = images.new_zeros(*images.shape[:2], frames, *images.shape[3:])
    video[:, :, :1] = images
    return video


def write_shards(encoder, folder, plan, on_shard=lambda done, total: None):
    """Encode what is not there yet. A shard appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    encoder.tails.clear()  # of another plan's pictures
    for done, (bucket, count, seed) in enumerate(plan):
        path = folder / f"{bucket.name}-{seed}.pt"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            torch.save(encoder.shard(bucket, count, seed), unfinished)
            unfinished.rename(path)
        on_shard(done + 1, len(plan))


class Latents:
    """All shards of a plan in memory, and batches of them."""

    def __init__(self, folder, plan):
        self.buckets = list(dict.fromkeys(bucket for bucket, _, _ in plan))
        self.parts, self.motions, self.chances = {}, {}, {}
        for bucket in self.buckets:
            names = [f"{b.name}-{seed}.pt" for b, _, seed in plan if b == bucket]
            shards = [torch.load(Path(folder) / name, weights_only=True) for name in names]
            self.motions[bucket] = [data.Motion(**m) for s in shards for m in s["motions"]]
            self.parts[bucket] = join_shards(shards)
            hard = [m.name.startswith(HARD) for m in self.motions[bucket]]
            chances = [HARD_WEIGHT if h else 1 for h in hard]
            with_end = [c * (at >= 0) for c, at in zip(chances, self.parts[bucket]["where"])]
            shapes = [SHAPE_WEIGHT if m.kind == "object" else 1 for m in self.motions[bucket]]
            # Every shard has clips with an end.
            kinds = {"start": chances, "alone": chances, "end": with_end, "empty": shapes}
            self.chances[bucket] = {kind: [*accumulate(weights)] for kind, weights in kinds.items()}
        self.weights = [len(self.motions[b]) * b.tokens for b in self.buckets]

    def draw(self, rng, tokens, kinds=KINDS):
        """A random batch of about `tokens` tokens: (clip, conditioning, motions) of `batch`.

        Args:
            kinds: how often each is drawn, in percent.
        """
        bucket = rng.choices(self.buckets, self.weights)[0]
        # At least two: of one clip the model takes its modulation and norm as one, with no mixed precision.
        count = max(2, tokens // bucket.tokens)
        mixed = {kind: share for kind, share in kinds.items() if kind != "alone"}
        alone = rng.random() < kinds["alone"] / 100  # one frame longer, hence a whole batch of them
        kinds = ["alone"] * count if alone else rng.choices([*mixed], mixed.values(), k=count)
        chances, every = self.chances[bucket], range(len(self.motions[bucket]))
        rows = [rng.choices(every, cum_weights=chances[kind])[0] for kind in kinds]
        return self.batch(bucket, rows, kinds)

    def batch(self, bucket, rows, kinds):
        """Clips and what the model is told about them.

        Args:
            rows: which clips of the bucket.
            kinds: of each: "start" (image), "end" (start image, and the last frame at its place; of the
                clips that were not encoded with it, the start alone), "empty" (no image at all, as the
                host feeds a model of 36 channels without one), "alone" (the end image as a latent of its
                own behind the clip; all of a batch or none).

        Returns:
            (clip [B, 16, T, h, w], conditioning [B, 4 + 16, T, h, w]: mask, 1 = known, and image
            latent; list of Motion)
        """
        part = self.parts[bucket]
        size = (bucket.frames, bucket.height, bucket.width)
        clip = part["clip"][rows].float()
        tail = part["tail"].float().expand(len(rows), -1, -1, -1, -1)
        image = torch.cat([part["start"][rows].float(), tail], dim=2)
        mask = known_mask(*size).repeat(len(rows), 1, 1, 1, 1)
        if kinds[0] == "alone":
            end = part["end"][rows].float()
            clip, image = torch.cat([clip, end], dim=2), torch.cat([image, end], dim=2)
            mask = known_mask(*size, True, True).expand(len(rows), -1, -1, -1, -1)
        with_end = known_mask(*size, True)[0]
        for i, (row, kind) in enumerate(zip(rows, kinds)):
            at = part["where"][row]
            if kind == "end" and at >= 0:
                image[i], mask[i] = part["start_and_end"][at].float(), with_end
            if kind == "empty":
                image[i], mask[i] = 0, 0
        return clip, torch.cat([mask, image], dim=1), [self.motions[bucket][row] for row in rows]


def join_shards(shards):
    """One tensor of each part; `where` finds a clip's row in `start_and_end`, -1 if it has none."""
    names = ("clip", "start", "end", "start_and_end")
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in names}
    where, found = [], 0
    for shard in shards:
        for i in range(len(shard["clip"])):
            where.append(found if i % WITH_END == 0 else -1)
            found += i % WITH_END == 0
    assert found == len(joined["start_and_end"])
    return joined | {"where": where, "tail": shards[0]["tail"]}
