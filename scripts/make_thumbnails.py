"""Run every workflow small on a real host, on pictures that a program drew: `workflows/<name>.jpg`.

python scripts/make_thumbnails.py                           # all of them
python scripts/make_thumbnails.py "Wan2.1 text to video (t2v)"    # this one
"""

import json
import sys
import tempfile
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

from lib.comfy_client import fill  # noqa: E402
from lib.contact_sheet import contact_sheet, read_frames  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.small_graphs import panning_clip, small_graph  # noqa: E402
from wan21.training import data  # noqa: E402
from wan21.training.host import to_picture  # noqa: E402

WORKFLOWS = pack.ROOT / "workflows"
SCENES = data.HELD_OUT + 6 * 10**6
SIZE = (128, 96)
NUM_FRAMES = 17
STEPS = 20
SAMPLING = {"guidance_scale": 3, "flow_shift": 3}  # what suits the bundled checkpoint
SHOWN = {  # graph -> (scene, prompts of its segments)
    "Wan2.1 - quick start": (14, "pan left"),
    "Wan2.1 - quick start.app": (39, "zoom in"),
    "Wan2.1 - quick start 4 steps": (24, "zoom in"),
    "Wan2.1 image to video (i2v)": (10, "pan right"),
    "Wan2.1 image to video (i2v).app": (17, "a purple triangle moves right"),
    "Wan2.1 4 steps image to video (lightx2v)": (19, "zoom in"),
    "Wan2.1 image to video TeaCache": (33, "zoom out"),
    "Wan2.1 image to video low VRAM": (12, "pan left"),
    "Wan2.1 image to video upscaled": (21, "zoom in"),
    "Wan2.1 long video RIFLEx": (5, "rotate clockwise"),
    "Wan2.1 long video in segments": (35, "pan left", "zoom in", "rotate clockwise"),
    "Wan2.1 first and last frame (flf2v)": (14, "pan right"),
    "Wan2.1 text to video (t2v)": (0, "a yellow square moves right"),
    "Wan2.1 video to video (v2v)": (24, "pan right"),
    "Wan2.2 image to video (i2v)": (20, "pan up"),
    "Wan2.2 4 steps image to video (lightx2v)": (29, "a black circle moves up"),
    "Wan2.2 text to video (t2v)": (0, "a green circle moves left"),
}
SEEDS = {"Wan2.1 text to video (t2v)": 3, "Wan2.2 text to video (t2v)": 5}
DENOISE = {"Wan2.1 video to video (v2v)": 0.4}
PICTURES = 4
WIDTH = 512


def main():
    """Write the thumbnails of the workflows named on the command line, or of all."""
    names = sys.argv[1:] or sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with HostServer(folder) as server:
            for name in names:
                clip = folder / f"{name}.mp4"
                clip.write_bytes(_run(server.client, _graph(name, folder, server.client)))
                _thumbnail(clip).save(WORKFLOWS / f"{name}.jpg", quality=85)


def _graph(name, folder, client):
    """The graph `name` on its scene, small."""
    source = WORKFLOWS / "api" / f"{name.removesuffix(' (app)')}.json"
    graph = json.loads(source.read_text(encoding="utf-8"))
    scene, *prompts = SHOWN[name]
    picture, (width, height) = folder / f"scene-{scene}.png", SIZE
    to_picture((data.images(SCENES + scene, 1, height, width)[0] + 1) / 2).save(picture)
    panned = panning_clip(picture, SIZE, NUM_FRAMES, 16)
    image = client.upload_image(picture)
    video = client.upload_image(panned, name=f"clip-{scene}.mp4")
    samplers = [node["inputs"] for node in graph.values() if node["class_type"] == "Wan21Sampler"]
    is_distilled = all(inputs["guidance_scale"] == 1 for inputs in samplers)
    small = small_graph(
        graph, SIZE, NUM_FRAMES, samplers[0]["steps"] if is_distilled else STEPS, image, video
    )
    for number, prompt in enumerate(prompts, 1):
        small = fill(small, "Positive prompt" if number == 1 else f"Positive prompt {number}", text=prompt)
    if any(node["_meta"]["title"] == "End image" for node in small.values()):
        (folder / "end.mp4").write_bytes(panned)
        start, *_, end = read_frames(folder / "end.mp4")
        start.save(folder / "start.png")
        end.save(folder / "end.png")
        small = fill(small, "Start image", image=client.upload_image(folder / "start.png"))
        small = fill(small, "End image", image=client.upload_image(folder / "end.png"))
    for node in small.values():
        if node["class_type"] == "Wan21Sampler":
            node["inputs"] |= {} if is_distilled else SAMPLING
            node["inputs"]["seed"] = SEEDS.get(name, 0)
            node["inputs"]["denoise"] = DENOISE.get(name, node["inputs"]["denoise"])
    return small


def _run(client, graph):
    """Return the bytes of the video a graph writes."""
    files = client.run(graph).files
    return client.download(next(file for file in files if file["filename"].endswith(".mp4")))


def _thumbnail(clip):
    sheet = contact_sheet(read_frames(clip), PICTURES)
    return sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)))


if __name__ == "__main__":
    main()
