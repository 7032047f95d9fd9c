"""Measure the bundled checkpoint on pictures it has never seen, through a real ComfyUI and our nodes.

    python training/evaluate.py                      # all of it, about a quarter of an hour on two CPU cores
    python training/evaluate.py --cases 18           # a quick look
    python training/evaluate.py --only camera lora --json eval.json

Prints a table of what was reached beside what was to be reached; ends with status 1 if anything is missed.
Contact sheets of the cases are left in build/eval_tiny.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1] / "scripts")  # in place of this folder

from lib import bundled, pack  # noqa: E402

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from lib.comfy_client import GraphRejected, JobFailed, fill, find_node  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.markdown import table  # noqa: E402
from wan21.training import captions, data, metrics  # noqa: E402
from wan21.training.held_out import held_out, photographs, pictures  # noqa: E402
from wan21.training.host import Host, to_picture  # noqa: E402

WORK = pack.ROOT / "build" / "eval_tiny"
# In place of what the graphs of the large models have.
SETTINGS = {"steps": 20, "guidance_scale": 2, "flow_shift": 3}
TEXT_ALONE = SETTINGS | {"guidance_scale": 3}


@dataclass
class Row:
    """One line of the table. `passed` is None where nothing was agreed."""

    what: str
    value: str
    target: str = ""
    passed: bool | None = None


def sheet(name, videos):
    """Some videos as rows of five frames each, to look at."""
    rows = []
    for video in videos[:18]:
        picked = video[torch.linspace(0, len(video) - 1, 5).round().long()]
        rows.append(torch.cat([*picked], dim=2))
    to_picture(torch.cat(rows, dim=1)).save(WORK / f"{name}.png")


# Each measurement takes (host, number of cases) and returns rows.


def measure_time(host, cases):
    """The whole graphs at the home size with their video files, first on a server that has loaded nothing."""
    size, seconds = (17, 128, 128), []
    image = pictures(0, 1, size)[0]
    for seed, steps in enumerate((" 4 steps", " 4 steps", "")):
        graph = host.graph(f"Wan2.1 - quick start{steps}", "pan left", size, seed, Start_image=image)
        started = time.perf_counter()
        host.run(graph)
        seconds.append(time.perf_counter() - started)
    return [
        Row(
            "4 steps, 17 frames at 128x128, loading included",
            f"{seconds[0]:.1f} s",
            "<= 10 s",
            seconds[0] <= 10,
        ),
        Row("the same again, models loaded", f"{seconds[1]:.1f} s"),
        Row("20 steps with guidance, models loaded", f"{seconds[2]:.1f} s"),
    ]


def measure_vae(host, cases):
    rows = []
    for size, target in (((17, 64, 64), 26), ((17, 96, 96), None), ((17, 128, 128), None)):
        count = max(4, cases // 6) if target else max(2, cases // 25)
        clips, _ = held_out(1000, count, size, None)
        values = [metrics.psnr(clip, host.reconstructed(clip)) for clip in clips]
        mean = statistics.mean(values)
        what = f"VAE on {count} clips, {size_name(size)}"
        if target:
            rows.append(Row(what, f"{mean:.1f} dB", f">= {target} dB", mean >= target))
        else:
            rows.append(Row(what, f"{mean:.1f} dB"))
    return [*rows, *measure_sharpness(host, max(2, cases // 12))]


def measure_sharpness(host, count, size=(17, 128, 128)):
    """What the VAE leaves of a clip at the size of the quick start."""
    clips, _ = held_out(1500, count, size, None)
    mean = metrics.quality([(host.reconstructed(clip), clip) for clip in clips])
    what = f"VAE on {count} clips, {size_name(size)}"
    return [
        Row(f"{what}: PSNR", f"{mean['psnr']:.1f} dB", ">= 32 dB", mean["psnr"] >= 32),
        Row(f"{what}: SSIM", f"{mean['ssim']:.3f}", ">= 0.94", mean["ssim"] >= 0.94),
        Row(f"{what}: edges", f"{mean['edges']:.2f}", ">= 0.85", mean["edges"] >= 0.85),
        Row(f"{what}: flicker", f"{mean['flicker']:.2f}", "0.9 to 1.1", 0.9 <= mean["flicker"] <= 1.1),
    ]


def measure_camera(host, cases):
    """Nine prompts on each picture; at 64 pixels also in free wording, and the first frames."""
    rows = []
    for side, count in ((64, cases), (96, max(9, cases // 3)), (128, max(9, cases // 3))):
        videos = camera_videos(host, (17, side, side), count, captions.canonical)
        rows.append(recognised(f"camera motion, 17x{side}x{side}", videos))
        sheet(f"camera_{side}", [video for _, _, video in videos])
        if side == 64:
            rows += first_frames(host, videos)
    for size in ((17, 64, 96), (9, 64, 64), (33, 64, 64)):
        videos = camera_videos(host, size, max(9, cases // 8), captions.canonical)
        rows.append(recognised(f"camera motion, {size_name(size)}", videos, agreed=False))
    rng = random.Random(0)
    videos = camera_videos(host, (17, 64, 64), max(9, cases // 3), lambda m: captions.caption(m, rng))
    rows.append(recognised("camera motion in free wording", videos, agreed=False))
    return rows


def camera_videos(host, size, count, wording):
    """[(picture, motion, video)]: each picture with all nine prompts, up to `count` cases."""
    images = pictures(2000 + size[0] + 7 * size[1], -(-count // len(data.CAMERA)), size)
    result = []
    for case in range(count):
        image, name = images[case // len(data.CAMERA)], data.CAMERA[case % len(data.CAMERA)]
        prompt = wording(data.Motion("camera", name))
        video = host.frames(host.graph("Wan2.1 - quick start", prompt, size, case, Start_image=image))
        result.append((image, name, video))
    return result


def recognised(what, videos, agreed=True):
    found = [metrics.camera_motion(image, video) for image, _, video in videos]
    missed = [f"{name} as {f}" for f, (_, name, _) in zip(found, videos) if f != name]
    if missed:
        print(f"  {what}: {', '.join(missed)}")
    share = 1 - len(missed) / len(videos)
    value = f"{len(videos) - len(missed)} of {len(videos)} ({100 * share:.0f} %)"
    return Row(what, value, ">= 97 %", share >= 0.97) if agreed else Row(what, value)


def first_frames(host, videos):
    """Against the VAE's own reconstruction, and between prompts: the picture stays, the end differs."""
    loss, same, different = [], [], []
    for image, name, video in videos:
        if name == data.CAMERA[0]:
            alone, reference = metrics.psnr(image, host.reconstructed(image[None])[0]), video
        loss.append(alone - metrics.psnr(image, video[0]))
        if video is not reference:
            same.append(metrics.psnr(reference[0], video[0]))
            different.append(metrics.psnr(reference[-1], video[-1]))
    worst, mean = max(loss), statistics.mean(loss)
    return [
        Row("first frame less than the VAE alone, mean", f"{mean:.2f} dB", "<= 0.5 dB", mean <= 0.5),
        Row("first frame less than the VAE alone, worst", f"{worst:.2f} dB"),
        Row(
            "first frames of one picture, other prompts",
            f"{statistics.mean(same):.1f} dB",
            ">= 30 dB",
            statistics.mean(same) >= 30,
        ),
        Row(
            "last frames of one picture, other prompts",
            f"{statistics.mean(different):.1f} dB",
            "<= 25 dB",
            statistics.mean(different) <= 25,
        ),
    ]


def measure_scenes(host, cases):
    """What changes a whole scene, each of the changes on each picture: at the home size, and at others."""
    few, rows = max(2, cases // 25), []
    for size, count, least in (
        ((17, 128, 128), max(2, cases // 12), 0.9),
        ((17, 64, 64), few, None),
        ((17, 80, 128), few, None),
        ((17, 192, 192), few, None),
    ):
        images, videos = pictures(7000, count, size), []
        for name in data.SCENES:
            prompt, found = captions.canonical(data.Motion("scene", name)), []
            for i, image in enumerate(images):
                graph = host.graph("Wan2.1 - quick start", prompt, size, i, Start_image=image)
                videos.append(host.frames(graph))
                found.append(metrics.scene_change(videos[-1]))
            what = f"{prompt}, {size_name(size)}: told from the other scenes"
            rows.append(share(what, found, [name] * len(found), least))
        sheet(f"scenes_{size_name(size)}", videos)
    return rows


def measure_photographs(host, cases):
    """A picture of the user's own comes out recognisable, though training saw drawn ones only."""
    size, alone, videos = (17, 128, 128), {}, {}
    for seed, (name, photograph) in enumerate(photographs().items()):
        alone[name] = metrics.psnr(photograph, host.reconstructed(photograph[None])[0])
        graph = host.graph("Wan2.1 - quick start", "still", size, seed, Start_image=photograph)
        videos[name] = (photograph, host.frames(graph))
    sheet("photographs", [video for _, video in videos.values()])
    first = {name: metrics.psnr(photograph, video[0]) for name, (photograph, video) in videos.items()}
    return [as_row("photographs, VAE alone", alone), as_row("photographs, first frame", first)]


def as_row(what, values):
    """Mean and worst of name -> dB."""
    worst = min(values, key=values.get)
    return Row(what, f"{statistics.mean(values.values()):.1f} dB, {worst} {values[worst]:.1f} dB")


def measure_object(host, cases):
    """A shape moves as told; then each shape with all four directions from one and the same picture."""
    rows = []
    rng = random.Random(1)
    size, count = (17, 64, 64), max(8, cases // 2)
    motions = [
        data.Motion("object", "move", rng.choice([*data.COLOURS]), rng.choice(data.SHAPES), way)
        for way in data.DIRECTIONS * (count // 4)
    ]
    clips, _ = held_out(3000, len(motions), size, motions)
    videos = [
        host.frames(host.graph("Wan2.1 - quick start", captions.canonical(m), size, i, Start_image=clip[0]))
        for i, (m, clip) in enumerate(zip(motions, clips))
    ]
    sheet("object", videos)
    found = [metrics.object_direction(video, m.colour) for video, m in zip(videos, motions)]
    rows.append(share("object direction", found, [m.direction for m in motions], 0.95))
    # the middle: from here a shape can go anywhere
    found, told, kept = [], [], []
    for i, m in enumerate(motions[: max(2, count // 8)]):
        middle = data.Motion("object", "grow", m.colour, m.shape)
        image = held_out(4000 + i, 1, size, [middle])[0][0, 8]
        for way in data.DIRECTIONS:
            prompt = captions.canonical(data.Motion("object", "move", m.colour, m.shape, way))
            kept.append(host.frames(host.graph("Wan2.1 - quick start", prompt, size, i, Start_image=image)))
            found.append(metrics.object_direction(kept[-1], m.colour))
            told.append(way)
    sheet("object_four_ways", kept)
    return [*rows, share("object from one picture in four ways", found, told)]


def share(what, found, told, least=None):
    right = sum(f == t for f, t in zip(found, told))
    value = f"{right} of {len(told)} ({100 * right / len(told):.0f} %)"
    if least is None:
        return Row(what, value)
    return Row(what, value, f">= {100 * least:.0f} %", right >= least * len(told))


def measure_end(host, cases):
    """First and last frame given, in both forms: the video ends where it was told to."""
    size, count = (17, 64, 64), max(3, cases // 10)
    clips, motions = held_out(5000, count, size, [*data.CAMERA])
    rows = []
    for alone, what in ((False, "last frame"), (True, "end image as latent of its own")):
        values, reached, videos = [], [], []
        for i, (clip, motion) in enumerate(zip(clips, motions)):
            prompt = captions.canonical(motion)
            images = {"Start_image": clip[0], "End_image": clip[-1]}
            graph = host.graph("Wan2.1 first and last frame (flf2v)", prompt, size, i, **images)
            graph = fill(graph, "Image to video", add_frames_for_end_image=alone)
            graph = fill(graph, "Wan21Sampler", **SETTINGS | host.sampling)
            videos.append(host.frames(graph))
            values.append(metrics.psnr(clip[-1], videos[-1][-1]))
            reached.append(metrics.psnr(clip[-1], host.reconstructed(clip)[-1]))
        sheet(f"end_{'alone' if alone else 'frame'}", videos)
        mean, best = statistics.mean(values), statistics.mean(reached)
        value = f"{mean:.1f} dB (VAE {best:.1f})"
        rows.append(Row(f"{what}, against the end image", value, ">= 28 dB", mean >= 28))
    return rows


def measure_text_only(host, cases):
    """No image at all: a shape appears and moves as told."""
    size, count = (17, 64, 64), max(4, cases // 8)
    found, told, videos = [], [], []
    for i in range(count):
        colour, way = [*data.COLOURS][i % 6], data.DIRECTIONS[i % 4]
        prompt = f"a {colour} circle moves {way}"
        try:
            graph = host.graph("Wan2.1 text to video (t2v)", prompt, size, i)
            videos.append(host.frames(fill(graph, "Wan21Sampler", **TEXT_ALONE | host.sampling)))
        except (GraphRejected, JobFailed) as error:
            return [Row("without image", f"refused: {str(error)[:60]}", ">= 75 %", False)]
        found.append(metrics.object_direction(videos[-1], colour))
        told.append(way)
    sheet("text_only", videos)
    return [share("without image: shape moves as told", found, told, 0.75)]


def measure_lora(host, cases):
    """Loaded by the host's own node: the colours drain, and with strength 0 nothing changes."""
    size = (17, 64, 64)
    ratios, equal, videos = [], True, []
    for i, image in enumerate(pictures(6000, 3, size)):
        graph = host.graph(
            "Wan2.1 - quick start", ("pan left", "zoom in", "still")[i], size, i, Start_image=image
        )
        plain = host.frames(graph)
        strong, none = (host.frames(with_lora(graph, strength)) for strength in (1.0, 0.0))
        ratios.append(metrics.saturation(strong[-1]) / metrics.saturation(plain[-1]))
        equal = equal and torch.equal(plain, none)
        videos += [plain, strong]
    sheet("lora", videos)
    mean = statistics.mean(ratios)
    return [
        Row("LoRA: colour left in the last frame", f"{100 * mean:.0f} %", "<= 40 %", mean <= 0.4),
        Row("LoRA of strength 0: the same pixels", str(equal), "True", equal),
    ]


def with_lora(graph, strength):
    graph = fill(graph, "Wan21Sampler", model=["lora", 0])
    inputs = {
        "model": [find_node(graph, "Wan21ModelLoader"), 0],
        "lora_name": bundled.COLOUR_LORA,
        "strength_model": strength,
    }
    graph["lora"] = {"class_type": "LoraLoaderModelOnly", "inputs": inputs}
    return graph


MEASUREMENTS = {
    "time": measure_time,
    "vae": measure_vae,
    "camera": measure_camera,
    "scenes": measure_scenes,
    "photographs": measure_photographs,
    "object": measure_object,
    "end": measure_end,
    "text_only": measure_text_only,
    "lora": measure_lora,
}


def size_name(size):
    return "x".join(map(str, size))


def main():
    """Run what was asked for and print the table."""
    options = arguments()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    rows = []
    with HostServer(WORK / "host", models_directory=options.models) as server:
        host = Host(server, **options.sampler)
        for name in options.only or MEASUREMENTS:
            started = time.perf_counter()
            rows += MEASUREMENTS[name](host, options.cases)
            print(f"  {name}: {time.perf_counter() - started:.0f} s", flush=True)
    print(as_table(rows))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    sys.exit(any(row.passed is False for row in rows))


def as_table(rows):
    mark = {True: "yes", False: "**NO**", None: ""}
    cells = ((r.what, r.value, r.target, mark[r.passed]) for r in rows)
    return table(("measured", "reached", "to reach", ""), cells)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=Path, help="another `models` folder than the pack's own")
    parser.add_argument(
        "--cases", type=int, default=100, help="camera cases at 64 pixels; the rest in proportion"
    )
    parser.add_argument("--only", nargs="+", choices=[*MEASUREMENTS])
    parser.add_argument(
        "--sampler",
        type=json.loads,
        default={},
        help='inputs of Wan21Sampler in place of the graph\'s: {"steps": 9}',
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
