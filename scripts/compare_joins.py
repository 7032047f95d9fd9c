"""Three segments in one video: drift of colour and contrast, and the seams, by how they are joined.

    python scripts/compare_joins.py [--pictures 8 --width 64 --height 64 --num-frames 17 --steps 20]
        [--prompt "pan left" ...]

Runs on the bundled checkpoint and on pictures that a program drew. For each segment: how far its mean colour
is from that of the start image (in L*a*b*, frames that are new in it) and its contrast (deviation of L*) in
percent of the start image's. Seam: the largest change from frame to frame at a join, over the mean change
elsewhere (- where nothing moves). The first row is the drawn clip itself: what the motion alone does to
colour and contrast. All numbers are means over pictures.
"""

import argparse
import math

from lib import bundled
from lib.markdown import table
from lib.pack import load_host, load_pack

load_pack()
load_host()

import torch  # noqa: E402
from kornia.color import rgb_to_lab  # noqa: E402
from wan21 import host  # noqa: E402
from wan21.nodes.clips import Wan21JoinClips  # noqa: E402
from wan21.nodes.image_to_video import Wan21ImageToVideo  # noqa: E402
from wan21.nodes.sampler import Wan21Sampler  # noqa: E402
from wan21.nodes.vae_decode import Wan21VAEDecode  # noqa: E402
from wan21.training import data  # noqa: E402

SEED = data.HELD_OUT + 7 * 10**6
SEGMENTS = 3
BLENDS = ("linear", "cut")
NEGATIVE = ""
# Name -> (known frames, match_color, whether a segment goes on from the joined clip, or from the one before).
CASES = {
    "1 known frame": (1, False, False),
    "1 known frame, match_color": (1, True, False),
    "1 known frame, match_color, going on from the joined clip": (1, True, True),
    "5 known frames": (5, False, False),
    "5 known frames, match_color": (5, True, False),
    "5 known frames, match_color, going on from the joined clip": (5, True, True),
}


class Job:
    """The bundled model, and one segment on it.

    Args:
        args: of `arguments`.
    """

    def __init__(self, args):
        self.args = args
        self.model = host.load_model(bundled.MODELS / "diffusion_models" / bundled.MODEL)
        self.vae = host.load_vae(bundled.MODELS / "vae" / bundled.VAE)
        encoder = host.load_text_encoder(bundled.MODELS / "text_encoders" / bundled.TEXT_ENCODER)
        self.prompts, self.negative = (
            [encoder.encode_from_tokens_scheduled(encoder.tokenize(text)) for text in texts]
            for texts in (args.prompt, [NEGATIVE])
        )

    def segment(self, number, start, seed):
        """Frames [F, H, W, 3] of one segment that begins with the frames `start`."""
        args = self.args
        prompt = self.prompts[number % len(self.prompts)]
        conditioning = Wan21ImageToVideo.execute(
            prompt, self.negative[0], self.vae, start_image=start, width=args.width, height=args.height,
            num_frames=args.num_frames, resize_mode="crop", add_frames_for_end_image=False, tile_size="auto",
        ).result  # fmt: skip
        latent, _ = Wan21Sampler.execute(
            self.model, *conditioning, seed=seed + number, steps=args.steps, guidance_scale=3.0,
            flow_shift=3.0, solver="unipc", denoise=1.0,
        ).result  # fmt: skip
        return Wan21VAEDecode.execute(self.vae, latent, "auto").result[0]


def clips_of(job, first, case, seed):
    """The frames of each segment, the first of which is given."""
    known, match, from_joined = case
    clips = [first]
    for number in range(1, SEGMENTS):
        before = join(clips, known, match, "cut") if from_joined else clips[-1]
        clips.append(job.segment(number, before[-known:], seed))
    return clips


def join(clips, known, match, blend):
    """One video, joined from left to right."""
    video = clips[0]
    for clip in clips[1:]:
        video = Wan21JoinClips.execute(video, clip, known, blend, match).result[0]
    return video


def bounds(num_frames, known):
    """(first, last + 1) of the frames that are new in each segment of a joined video."""
    ends = [num_frames + i * (num_frames - known) for i in range(SEGMENTS)]
    return list(zip([0, *ends], ends))


def drift(video, start, places):
    """For each segment (distance of the mean colour from the start image's, contrast in percent of its)."""
    mean, contrast = statistics(start[None])
    found = [statistics(video[first:last]) for first, last in places]
    return [((m - mean).norm().item(), 100 * c / contrast) for m, c in found]


def statistics(frames):
    """[F, H, W, 3] -> (mean colour (3,), mean over frames of the deviation of L*)."""
    lab = rgb_to_lab(frames.clamp(0, 1).movedim(-1, 1)).flatten(2)
    return lab.mean(dim=(0, 2)), lab[:, 0].std(dim=1).mean().item()


def seam(video, places, known):
    """The largest change of frames at a join, overlap included, over the mean of those elsewhere."""
    change = (video[1:] - video[:-1]).abs().mean(dim=(1, 2, 3))
    elsewhere = torch.ones(len(change), dtype=torch.bool)
    largest = []
    for first, _ in places[1:]:
        at = slice(first - known - 1, first)  # from the last frame before the overlap to the first behind it
        elsewhere[at] = False
        largest.append(change[at].max())
    return (torch.stack(largest).mean() / change[elsewhere].mean()).item()


def compare(args):
    """Rows of numbers by name: drift of each segment, seam with each blend; means over pictures."""
    job, rows = Job(args), {}
    for picture in range(args.pictures):
        places = bounds(args.num_frames, 1)
        drawn = drawn_clip(SEED + picture, places[-1][1], args)
        start, seed = drawn[0], 100 * picture
        first = job.segment(0, start[None], seed)
        if len(args.prompt) == 1:
            add(rows, "drawn", drift(drawn, start, places), [seam(drawn, places, 1)] * len(BLENDS))
        sampled = {}
        for name, (known, match, from_joined) in CASES.items():
            if (known, from_joined) not in sampled:
                sampled[known, from_joined] = clips_of(job, first, (known, match, from_joined), seed)
            videos = [join(sampled[known, from_joined], known, match, blend) for blend in BLENDS]
            places = bounds(args.num_frames, known)
            add(
                rows, name, drift(videos[0], start, places),
                [seam(video, places, known) for video in videos],
            )  # fmt: skip
        print(f"picture {picture + 1} of {args.pictures}", flush=True)
    return {name: (sums / args.pictures).tolist() for name, sums in rows.items()}


def drawn_clip(seed, frames, args):
    """[F, H, W, 3] in [0, 1]: a drawn scene under the camera's motion of the first prompt."""
    video, _ = data.clips(seed, 1, frames, args.height, args.width, [args.prompt[0]])
    return (video[0].permute(1, 2, 3, 0) + 1) / 2


def add(rows, name, drifts, seams):
    """Adds the numbers of one picture to the sums of a row."""
    numbers = torch.tensor([*(number for pair in drifts for number in pair), *seams])
    rows[name] = rows.get(name, 0) + numbers


def as_table(rows):
    columns = [f"{what} {i}" for i in range(1, SEGMENTS + 1) for what in ("colour", "contrast")]
    formats = ["{:.1f}", "{:.0f} %"] * SEGMENTS + ["{:.2f}"] * len(BLENDS)
    return table(
        ("joined with", *columns, *(f"seam, {blend}" for blend in BLENDS)),
        (
            (name, *("-" if math.isnan(number) else f.format(number) for f, number in zip(formats, row)))
            for name, row in rows.items()
        ),
    )


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--num-frames", type=int, default=17)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompt", action="append", help="of each segment in turn; default: pan left")
    args = parser.parse_args(argv)
    args.prompt = args.prompt or ["pan left"]
    return args


def main():
    with torch.inference_mode():
        print(as_table(compare(arguments())))


if __name__ == "__main__":
    main()
