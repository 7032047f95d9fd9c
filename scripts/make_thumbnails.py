"""Run every workflow small on a real host, on pictures that a program drew: `workflows/<name>.jpg`.

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

from lib.comfy_client import fill  # noqa: E402
from lib.contact_sheet import read_frames  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.moving import FRAME_MS, Card, drawn, webp  # noqa: E402
from lib.small_graphs import small_graph  # noqa: E402
from wan21.training import data  # noqa: E402
from wan21.training.host import lossless, to_picture  # noqa: E402

WORKFLOWS = pack.ROOT / "workflows"
SCENES = data.HELD_OUT + 6 * 10**6
STEPS, SHIFT = 20, 3  # what suits the bundled checkpoint
SIDE = 256  # pixels of a thumbnail; the editor shows 254
MOST_BYTES = 150_000


@dataclass(frozen=True)
class Shown:
    """What a thumbnail is made of.

    Attributes:
        label: what the graph is, in a word or two.
        scene: number of the start picture.
        prompts: of the segments; one for most graphs.
        num_frames: of a segment, 4n+1.
        side: pixels of the start picture's and the video's sides; text alone comes out best at 64.
        seed, guidance, denoise: of the sampler; the graph's own where it runs without guidance, or denoise is None.
        frame_ms: how long a frame is shown.
    """

    label: str
    scene: int
    prompts: tuple[str, ...]
    num_frames: int = 17
    side: int = 128
    seed: int = 0
    guidance: float = 3
    denoise: float | None = None
    frame_ms: int = FRAME_MS


SHOWN = {
    "Wan2.1 - quick start": Shown("quick start", 0, ("pan left",)),
    "Wan2.1 - quick start.app": Shown("quick start, as a form", 12, ("zoom in",)),
    "Wan2.1 - quick start 4 steps": Shown("quick start, 4 steps", 120, ("zoom out",)),
    "Wan2.1 image to video (i2v)": Shown("image to video", 21, ("pan left",)),
    "Wan2.1 image to video (i2v).app": Shown("as a form", 85, ("a red square moves right",)),
    "Wan2.1 4 steps image to video (lightx2v)": Shown("4 steps", 159, ("pan left",)),
    "Wan2.1 image to video TeaCache": Shown("TeaCache", 31, ("zoom out",)),
    "Wan2.1 image to video low VRAM": Shown("low VRAM", 166, ("pan right",)),
    "Wan2.1 image to video upscaled": Shown("x2 frames, x1.5 size", 4, ("zoom in",), frame_ms=FRAME_MS // 2),
    "Wan2.1 long video RIFLEx": Shown("RIFLEx", 144, ("rotate clockwise",), num_frames=33),
    "Wan2.1 long video in segments": Shown("3 segments", 126, ("zoom out", "pan left", "zoom in")),
    "Wan2.1 first and last frame (flf2v)": Shown("first and last frame", 28, ("pan right",)),
    "Wan2.1 text to video (t2v)": Shown(
        "text to video", 0, ("a red circle moves right",), side=64, seed=1, guidance=5
    ),
    "Wan2.1 video to video (v2v)": Shown("video to video", 41, ("pan right",), denoise=0.4),
    "Wan2.2 image to video (i2v)": Shown("Wan2.2", 111, ("a blue square moves right",)),
    "Wan2.2 4 steps image to video (lightx2v)": Shown("Wan2.2, 4 steps", 172, ("a white square moves up",)),
    "Wan2.2 text to video (t2v)": Shown(
        "Wan2.2 text to video", 0, ("a yellow circle bounces",), side=64, guidance=5
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
    for title, clip in _sources(graph, shown).items():
        frames = [to_picture(frame) for frame in clip]
        inputs.append(frames)
        if title == "Source video":
            graph = fill(graph, title, file=client.upload_image(lossless(clip), name="source.mkv"))
        else:
            graph = fill(graph, title, image=client.upload_image(_png(frames[0]), name=f"{title}.png"))
    files = client.run(graph).files
    video = client.download(next(file for file in files if file["filename"].endswith(".mp4")))
    card = Card(shown.label, " - ".join(shown.prompts), inputs)
    return webp(drawn(read_frames(io.BytesIO(video)), card, SIDE), MOST_BYTES, shown.frame_ms)


def _sources(graph, shown):
    """What the graph starts from: title of its node -> frames [F, 3, H, W] in [0, 1], one of a still."""
    titles = {node["_meta"]["title"] for node in graph.values()}
    if titles & {"End image", "Source video"}:
        clip, _ = data.clips(
            SCENES + shown.scene, 1, shown.num_frames, shown.side, shown.side, motions=shown.prompts
        )
        clip = clip[0].movedim(1, 0)
    else:
        clip = data.images(SCENES + shown.scene, 1, shown.side, shown.side)
    clip = (clip + 1) / 2
    sources = {"Start image": clip[:1], "End image": clip[-1:], "Source video": clip}
    return {title: frames for title, frames in sources.items() if title in titles}


def _small(graph, shown):
    """The graph on the bundled checkpoint, with its prompts and seed."""
    samplers = [node["inputs"] for node in graph.values() if node["class_type"] == "Wan21Sampler"]
    is_distilled = all(inputs["guidance_scale"] == 1 for inputs in samplers)
    small = small_graph(
        graph, (shown.side, shown.side), shown.num_frames, samplers[0]["steps"] if is_distilled else STEPS
    )
    for number, prompt in enumerate(shown.prompts, 1):
        small = fill(small, "Positive prompt" if number == 1 else f"Positive prompt {number}", text=prompt)
    for node in small.values():
        if node["class_type"] == "Wan21Sampler":
            if not is_distilled:
                node["inputs"] |= {"guidance_scale": shown.guidance, "flow_shift": SHIFT}
            node["inputs"]["seed"] = shown.seed
            node["inputs"]["denoise"] = shown.denoise or node["inputs"]["denoise"]
    return small


def _png(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


if __name__ == "__main__":
    main()
