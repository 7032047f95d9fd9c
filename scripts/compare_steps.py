"""The bundled model in 20 steps and in 4, without the LoRA that was distilled for 4 and with it.

    python scripts/compare_steps.py [--size 64 --pictures 8 --lora FILE --sheet build/steps.png]
        [--only "20 steps" ...]

On drawn pictures that no training has seen, each with the nine camera prompts, and on as many where a
shape moves. All rows begin from the same noise. First frame: PSNR with the picture. Camera, shape: prompts
that were followed, of all. Nearness: PSNR of all frames with the 20-step video from the same noise, which a
good video of other content would miss as well; the picture standing still is the last row, to compare.
Sharpness: mean difference of neighbouring pixels in percent of the 20-step video's. Seconds: of sampling one
clip, models loaded.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

from lib import bundled
from lib.markdown import table
from lib.pack import load_host, load_pack

load_pack()
load_host()

import torch  # noqa: E402
from wan21 import host  # noqa: E402
from wan21.nodes.image_to_video import Wan21ImageToVideo  # noqa: E402
from wan21.nodes.sampler import Wan21Sampler  # noqa: E402
from wan21.nodes.vae_decode import Wan21VAEDecode  # noqa: E402
from wan21.training import captions, data, metrics  # noqa: E402
from wan21.training.held_out import held_out, pictures  # noqa: E402
from wan21.training.host import to_picture  # noqa: E402

NUM_FRAMES = 17
FOUR = {"steps": 4, "guidance_scale": 1.0, "flow_shift": 5.0, "solver": "euler"}
FULL = "20 steps, guidance 2"
# Name -> (whether with the LoRA, inputs of the sampler). The first is what the others are compared with.
CASES = {
    FULL: (False, {"steps": 20, "guidance_scale": 2.0, "flow_shift": 3.0, "solver": "unipc"}),
    "4 steps, guidance 2": (False, FOUR | {"guidance_scale": 2.0}),
    "4 steps, guidance 1": (False, FOUR),
    "4 steps, guidance 1, LoRA": (True, FOUR),
    "the same with lcm": (True, FOUR | {"solver": "lcm"}),
}
STILL = "the picture, standing still"


@dataclass
class Clip:
    """What is asked for: a start image [3, H, W] in [0, 1], a motion of `training.data`, a seed."""

    image: torch.Tensor
    motion: data.Motion
    seed: int


class Job:
    """The bundled model, without and with the LoRA.

    Args:
        lora: its file.
        side: of the clips, in pixels.
    """

    def __init__(self, lora, side):
        self.side = side
        plain = host.load_model(bundled.MODELS / "diffusion_models" / bundled.MODEL)
        self.models = {False: plain, True: host.add_lora(plain, host.read_lora(lora, plain), 1.0)}
        self.vae = host.load_vae(bundled.MODELS / "vae" / bundled.VAE)
        self.encoder = host.load_text_encoder(bundled.MODELS / "text_encoders" / bundled.TEXT_ENCODER)
        self.negative = self.encode("")

    def encode(self, text):
        return self.encoder.encode_from_tokens_scheduled(self.encoder.tokenize(text))

    def video(self, clip, with_lora, inputs):
        """(frames [F, 3, H, W] in [0, 1], seconds of sampling)."""
        conditioning = Wan21ImageToVideo.execute(
            self.encode(captions.canonical(clip.motion)), self.negative, self.vae,
            start_image=clip.image.movedim(0, -1)[None], width=self.side, height=self.side,
            num_frames=NUM_FRAMES, resize_mode="crop", add_frames_for_end_image=False, tile_size="auto",
        ).result  # fmt: skip
        started = time.perf_counter()
        model = self.models[with_lora]
        latent, _ = Wan21Sampler.execute(model, *conditioning, seed=clip.seed, denoise=1.0, **inputs).result
        seconds = time.perf_counter() - started
        return Wan21VAEDecode.execute(self.vae, latent, "auto").result[0].movedim(-1, 1), seconds


def clips_of(count, side):
    """Clips of camera motion, nine a picture, and as many of shapes that move."""
    size = (NUM_FRAMES, side, side)
    found = [
        Clip(image, data.as_motion(name), 100 * i + k)
        for i, image in enumerate(pictures(8000 + side, count, size))
        for k, name in enumerate(data.CAMERA)
    ]
    colours, shapes = [*data.COLOURS], data.SHAPES
    motions = [
        data.Motion(
            "object", "move", colours[i % len(colours)], shapes[i % len(shapes)], data.DIRECTIONS[i % 4]
        )
        for i in range(len(found))
    ]
    videos, _ = held_out(9000 + side, len(motions), size, motions)
    return found + [
        Clip(video[0], motion, 10**5 + i) for i, (video, motion) in enumerate(zip(videos, motions))
    ]


def followed(clip, video):
    if clip.motion.kind == "camera":
        return metrics.camera_motion(clip.image, video) == clip.motion.name
    return metrics.object_direction(video, clip.motion.colour) == clip.motion.direction


def sharpness(video):
    """Mean difference of neighbouring pixels."""
    return (video.diff(dim=-1).abs().mean() + video.diff(dim=-2).abs().mean()).item()


def measured(clip, video, reference, seconds):
    """The numbers of one clip, by column; NaN where a column does not concern it."""
    camera = clip.motion.kind == "camera"
    good = float(followed(clip, video))
    return torch.tensor(
        [
            metrics.psnr(clip.image, video[0]),
            good if camera else torch.nan,
            torch.nan if camera else good,
            metrics.psnr(reference, video),
            100 * sharpness(video) / sharpness(reference),
            seconds,
        ]
    )


def compare(job, clips, cases):
    """Means over clips by name of the case, and the videos of the first clips, case by case."""
    rows, shown = {}, {name: [] for name in cases}
    job.video(clips[0], *CASES[FULL])  # loads the model
    for done, clip in enumerate(clips):
        reference, seconds = job.video(clip, *CASES[FULL])
        for name, case in cases.items():
            video, spent = (reference, seconds) if name == FULL else job.video(clip, *case)
            rows.setdefault(name, []).append(measured(clip, video, reference, spent))
            shown[name].append(video)
        still = clip.image.expand_as(reference)
        rows.setdefault(STILL, []).append(measured(clip, still, reference, torch.nan))
        if (done + 1) % 9 == 0:
            print(f"{done + 1} of {len(clips)} clips", flush=True)
    return {name: torch.stack(found).nanmean(0).tolist() for name, found in rows.items()}, shown


def as_table(rows):
    columns = ("first frame", "camera", "shape", "nearness", "sharpness", "seconds")
    return table(("", *columns), ((name, *cells(numbers)) for name, numbers in rows.items()))


def cells(numbers):
    first, camera, shape, nearness, sharp, seconds = numbers
    yield f"{first:.1f} dB" if first < 90 else ""  # dB; the picture itself
    yield from (f"{100 * share:.0f} %" for share in (camera, shape))
    yield f"{nearness:.1f} dB" if nearness < 90 else ""
    yield f"{sharp:.0f} %"
    yield f"{seconds:.2f}" if seconds == seconds else ""


def sheet(shown, path, every):
    """Some clips, a row a case of four frames, to look at."""
    rows = []
    for i in range(0, len(next(iter(shown.values()))), every):
        rows += [torch.cat([*videos[i][[0, 5, 11, 16]]], 2) for videos in shown.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    to_picture(torch.cat(rows, 1)).save(path)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="side of the clips, 64 to 192 pixels")
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--lora", type=Path, default=bundled.MODELS / "loras" / bundled.FOUR_STEPS_LORA)
    parser.add_argument("--sheet", type=Path, help="also write a picture of some of the clips")
    parser.add_argument("--only", nargs="+", choices=[*CASES], default=[*CASES])
    return parser.parse_args(argv)


def main():
    args = arguments()
    with torch.inference_mode():
        job = Job(args.lora, args.size)
        rows, shown = compare(job, clips_of(args.pictures, args.size), {n: CASES[n] for n in args.only})
    print(as_table(rows))
    if args.sheet:
        sheet(shown, args.sheet, every=7)


if __name__ == "__main__":
    main()
