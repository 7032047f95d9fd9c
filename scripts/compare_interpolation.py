"""PSNR of interpolated frames against the true ones, on drawn motion, for each way to make them; and time.

    python scripts/compare_interpolation.py [--width 416 --height 240 --frames 9 --method x2]
        [--model models/frame_interpolation/FILE ...]

The scenes are drawn at any time, so the frames between are known: a pan, a zoom, a rotation, and a ball that
flies over a background and covers it. `repeat` shows the frame before, `blend` mixes both neighbours,
`minterpolate` is Wan21TemporalUpsample without a model; `--model` adds RIFE or FILM files.
"""

import argparse
import functools
import math
import time
from pathlib import Path

from lib.markdown import table
from lib.pack import load_host, load_pack
from lib.quality import psnr

load_pack()
load_host()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from wan21.nodes.upsample import MULTIPLIERS, Wan21TemporalUpsample  # noqa: E402

OCTAVES = {4: 1.0, 8: 0.7, 16: 0.5, 32: 0.4, 64: 0.3, 128: 0.25}  # cells of a side -> contrast


@functools.cache
def texture(seed, size=512):
    """A picture (1, 3, size, size) with detail at every scale down to four pixels."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        contrast * F.interpolate(torch.randn(1, 3, k, k, generator=generator), size=size, mode="bicubic")
        for k, contrast in OCTAVES.items()
    ]
    picture = sum(layers)
    return ((picture - picture.mean()) / picture.std() * 0.22 + 0.5).clamp(0, 1)


def look(picture, x, y):
    """The picture at places in [-1, 1]: (3, H, W)."""
    at = torch.stack([x, y], dim=-1)[None]
    return F.grid_sample(picture, at, mode="bicubic", padding_mode="reflection", align_corners=True)[0]


def pan(t, x, y):
    return look(texture(0), x / 2 + 0.05 * t, y / 2 + 0.017 * t)


def zoom(t, x, y):
    scale = 0.8 * 0.94**t
    return look(texture(1), x * scale, y * scale)


def rotation(t, x, y):
    cos, sin = 0.6 * math.cos(0.08 * t), 0.6 * math.sin(0.08 * t)
    return look(texture(2), x * cos - y * sin, x * sin + y * cos)


def ball(t, x, y):
    """Drawn over a still background, with an edge about four pixels wide."""
    x_ball, y_ball = x + 0.6 - 0.1 * t, y - 0.2 * math.sin(0.4 * t)
    inside = ((0.35 - torch.hypot(x_ball, y_ball)) * x.shape[1] / 4).sigmoid()
    return torch.lerp(look(texture(3), x, y), look(texture(4), x_ball, y_ball), inside)


SCENES = {"pan": pan, "zoom": zoom, "rotation": rotation, "ball": ball}


def draw(scene, count, step, height, width):
    """[count, height, width, 3]: the scene at 0, step, 2 * step ..."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    return torch.stack([scene(i * step, x, y).permute(1, 2, 0).clamp(0, 1) for i in range(count)])


def repeat(images, multiplier):
    return images.repeat_interleave(multiplier, dim=0)[: (len(images) - 1) * multiplier + 1]


def blend(images, multiplier):
    at = torch.arange((len(images) - 1) * multiplier + 1)
    first, t = at // multiplier, (at % multiplier / multiplier)[:, None, None, None]
    return torch.lerp(images[first], images[(first + 1).clamp(max=len(images) - 1)], t)


def interpolate(images, multiplier, model=None):
    method = next(name for name, value in MULTIPLIERS.items() if value == multiplier)
    return Wan21TemporalUpsample.execute(images, 16.0, method, model, scene_cut_threshold=1.0).result[0]


def with_model(path):
    """The host's loader on a file, as a way to interpolate."""
    import folder_paths
    from comfy_extras.nodes_frame_interpolation import FrameInterpolationModelLoader

    folder_paths.add_model_folder_path("frame_interpolation", str(path.resolve().parent))
    model = FrameInterpolationModelLoader.execute(path.name).result[0]
    return lambda images, multiplier: interpolate(images, multiplier, model)


def compare(ways, args):
    """-> rows of (way, {scene: PSNR in dB of the new frames}, seconds and CPU seconds for a new frame)."""
    multiplier = MULTIPLIERS[args.method]
    count = (args.frames - 1) * multiplier + 1
    true = {name: draw(f, count, 1 / multiplier, args.height, args.width) for name, f in SCENES.items()}
    new = torch.arange(count) % multiplier != 0
    rows = []
    for way, run in ways.items():
        found, seconds, cpu_seconds = {}, 0.0, 0.0
        for scene, frames in true.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            result = run(frames[::multiplier], multiplier)
            seconds += time.perf_counter() - started
            cpu_seconds += time.process_time() - cpu_started
            found[scene] = psnr(result[new], frames[new])
        made = len(true) * int(new.sum())
        rows.append((way, found, seconds / made, cpu_seconds / made))
    return rows


def as_table(rows):
    return table(
        ("way", *SCENES, "s a new frame", "CPU s"),
        (
            (way, *(f"{found[scene]:.1f} dB" for scene in SCENES), f"{seconds:.2f}", f"{cpu_seconds:.2f}")
            for way, found, seconds, cpu_seconds in rows
        ),
    )


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=416)
    parser.add_argument("--height", type=int, default=240)
    parser.add_argument("--frames", type=int, default=9, help="of the clip before interpolation")
    parser.add_argument("--method", choices=list(MULTIPLIERS), default="x2")
    parser.add_argument("--model", type=Path, action="append", default=[], help="a RIFE or FILM file")
    return parser.parse_args(argv)


def main():
    args = arguments()
    ways = {"repeat": repeat, "blend": blend, "minterpolate": interpolate}
    ways |= {path.stem: with_model(path) for path in args.model}
    with torch.inference_mode():
        print(as_table(compare(ways, args)))


if __name__ == "__main__":
    main()
