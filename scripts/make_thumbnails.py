"""Run every workflow small on a real host, on scenes that `lib/scenes.py` draws: `workflows/<name>.jpg`.

The editor asks for a picture of that name for the graphs of a pack, and browsers go by what is in a file.
Here it is an animated WebP, which moves in the template browser.

python scripts/make_thumbnails.py                                 # all of them
python scripts/make_thumbnails.py "Wan2.1 text to video (t2v)"    # this one
"""

import io
import json
import sys
import tempfile
from dataclasses import dataclass

from lib import pack

pack.load_pack()
pack.load_host()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from lib.comfy_client import fill  # noqa: E402
from lib.contact_sheet import read_frames  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.moving import FRAME_MS, Card, drawn, webp  # noqa: E402
from lib.scenes import SCENES, panned, small  # noqa: E402
from lib.small_graphs import small_graph  # noqa: E402
from wan21.training.host import lossless  # noqa: E402

WORKFLOWS = pack.ROOT / "workflows"
STEPS, SHIFT = 20, 3  # what suits the bundled checkpoint
SIDE = 256  # pixels of a thumbnail; the editor shows 254
MOST_BYTES = 150_000


@dataclass(frozen=True)
class Shown:
    """What a thumbnail is made of.

    Attributes:
        label: what the graph is, in a word or two.
        scene: of `lib/scenes.py`, to start from; None for text alone.
        prompts: of the segments; one for most graphs.
        num_frames: of a segment, 4n+1.
        side: pixels of the start picture's and the video's sides; text alone comes out best at 64.
        seed: of the sampler.
        guidance: of a graph that runs with it.
        denoise: None is the graph's own.
        frame_ms: how long a frame is shown.
    """

    label: str
    scene: str | None
    prompts: tuple[str, ...]
    num_frames: int = 17
    side: int = 128
    seed: int = 0
    guidance: float = 2
    denoise: float | None = None
    frame_ms: int = FRAME_MS


SHOWN = {
    "Wan2.1 - quick start": Shown("quick start", "bay", ("waves on the water",)),
    "Wan2.1 - quick start.app": Shown("quick start, as a form", "meadow", ("zoom in",)),
    "Wan2.1 - quick start 4 steps": Shown("quick start, 4 steps", "winter", ("it snows",)),
    "Wan2.1 image to video (i2v)": Shown("image to video", "autumn", ("it snows",)),
    "Wan2.1 image to video (i2v).app": Shown("image to video, as a form", "lighthouse", ("night falls",)),
    "Wan2.1 4 steps image to video (lightx2v)": Shown("4 steps", "desert", ("pan right",)),
    "Wan2.1 image to video TeaCache": Shown("TeaCache", "winter", ("night falls",)),
    "Wan2.1 image to video low VRAM": Shown("low VRAM", "bay", ("pan left",)),
    "Wan2.1 image to video upscaled": Shown(
        "x2 frames, x1.5 size", "meadow", ("pan right",), frame_ms=FRAME_MS // 2
    ),
    "Wan2.1 long video RIFLEx": Shown("RIFLEx", "lighthouse", ("pan left",), num_frames=33),
    "Wan2.1 long video in segments": Shown("3 segments", "autumn", ("pan right", "pan left", "zoom in")),
    "Wan2.1 first and last frame (flf2v)": Shown("first and last frame", "winter", ("pan right",)),
    "Wan2.1 text to video (t2v)": Shown(
        "text to video", None, ("a green circle moves right",), side=64, seed=1, guidance=3
    ),
    "Wan2.1 video to video (v2v)": Shown("video to video", "lighthouse", ("pan right",), denoise=0.3),
    "Wan2.2 image to video (i2v)": Shown("Wan2.2", "night", ("it snows",)),
    "Wan2.2 4 steps image to video (lightx2v)": Shown(
        "Wan2.2, 4 steps", "lighthouse", ("waves on the water",)
    ),
    "Wan2.2 text to video (t2v)": Shown(
        "Wan2.2 text to video", None, ("a yellow circle moves down",), side=64, seed=3, guidance=3
    ),
}


def main():
    """Write the thumbnails of the workflows named on the command line, or of all."""
    names = sys.argv[1:] or sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        for name in names:
            (WORKFLOWS / f"{name}.jpg").write_bytes(_thumbnail(name, server.client))


def _thumbnail(name, client):
    """Run the graph `name` on its scene; return its moving picture."""
    shown = SHOWN[name]
    graph = json.loads((WORKFLOWS / "api" / f"{name.removesuffix('.app')}.json").read_text(encoding="utf-8"))
    graph, inputs = _small(graph, shown), []
    for title, frames in _sources(graph, shown).items():
        inputs.append(frames)
        if title == "Source video":
            graph = fill(graph, title, file=client.upload_image(_clip(frames), name="source.mkv"))
        else:
            graph = fill(graph, title, image=client.upload_image(_png(frames[0]), name=f"{title}.png"))
    files = client.run(graph).files
    video = client.download(next(file for file in files if file["filename"].endswith(".mp4")))
    card = Card(shown.label, " - ".join(shown.prompts), inputs)
    return webp(drawn(read_frames(io.BytesIO(video)), card, SIDE), MOST_BYTES, shown.frame_ms)


def _sources(graph, shown):
    """What the graph starts from: title of its node -> frames (Pillow), one of a still."""
    if shown.scene is None:
        return {}
    scene, titles = SCENES[shown.scene](), {node["_meta"]["title"] for node in graph.values()}
    is_moving = titles & {"End image", "Source video"}
    clip = panned(scene, shown.num_frames) if is_moving else [scene]
    clip = [small(frame, shown.side) for frame in clip]
    sources = {"Start image": clip[:1], "End image": clip[-1:], "Source video": clip}
    return {title: frames for title, frames in sources.items() if title in titles}


def _small(graph, shown):
    """The graph on the bundled checkpoint, with its prompts and seed."""
    samplers = [node["inputs"] for node in graph.values() if node["class_type"] == "Wan21Sampler"]
    is_distilled = all(inputs["guidance_scale"] == 1 for inputs in samplers)
    steps = samplers[0]["steps"] if is_distilled else STEPS
    small = small_graph(graph, (shown.side, shown.side), shown.num_frames, steps)
    for number, prompt in enumerate(shown.prompts, 1):
        small = fill(small, "Positive prompt" if number == 1 else f"Positive prompt {number}", text=prompt)
    for node in small.values():
        if node["class_type"] == "Wan21Sampler":
            if not is_distilled:
                node["inputs"] |= {"guidance_scale": shown.guidance, "flow_shift": SHIFT}
            node["inputs"]["seed"] = shown.seed
            node["inputs"]["denoise"] = shown.denoise or node["inputs"]["denoise"]
    return small


def _clip(frames):
    """The frames as bytes of a video file."""
    return lossless(torch.from_numpy(np.stack(frames)).movedim(-1, 1) / 255)


def _png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
