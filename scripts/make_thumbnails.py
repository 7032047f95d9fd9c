"""Run every workflow small on a real host, on a picture that a program drew: `workflows/<name>.jpg`.

python scripts/make_thumbnails.py             # all of them
python scripts/make_thumbnails.py i2v t2v     # these
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
SEED = data.HELD_OUT + 6 * 10**6 + 14  # a house before hills
SIZE = (128, 96)
NUM_FRAMES = 17
STEPS = 20
SAMPLING = {"guidance_scale": 3, "flow_shift": 3}  # what suits the bundled checkpoint
PROMPT = "pan left"
PROMPTS = {  # graph -> title -> text
    "Wan2.1 text to video": {"Positive prompt": "a red circle moves right"},
    "Wan2.1 long video RIFLEx": {"Positive prompt": "rotate clockwise"},
    "Wan2.1 image to video TeaCache": {"Positive prompt": "zoom in"},
    "Wan2.1 image to video 4 steps": {"Positive prompt": "pan right"},
    "Wan2.1 - quick start 4 steps": {"Positive prompt": "zoom in"},
    "Wan2.2 image to video": {"Positive prompt": "zoom out"},
    "Wan2.2 image to video 4 steps": {"Positive prompt": "pan up"},
    "Wan2.1 long video in segments": {
        "Positive prompt": "pan left",
        "Positive prompt 2": "zoom in",
        "Positive prompt 3": "rotate clockwise",
    },
}
PICTURES = 9
WIDTH = 512


def main():
    """Write the thumbnails of the workflows named on the command line, or of all."""
    names = sys.argv[1:] or sorted(path.stem for path in (WORKFLOWS / "api").glob("*.json"))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        with HostServer(folder) as server:
            picture = folder / "picture.png"
            width, height = SIZE
            to_picture((data.images(SEED, 1, height, width)[0] + 1) / 2).save(picture)
            image = server.client.upload_image(picture)
            video = server.client.upload_image(panning_clip(picture, SIZE, NUM_FRAMES, 16), name="clip.mp4")
            for name in names:
                graph = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text(encoding="utf-8"))
                samplers = [n["inputs"] for n in graph.values() if n["class_type"] == "Wan21Sampler"]
                is_distilled = all(inputs["guidance_scale"] == 1 for inputs in samplers)
                steps = samplers[0]["steps"] if is_distilled else STEPS
                small = small_graph(graph, SIZE, NUM_FRAMES, steps, image, video)
                for title, prompt in PROMPTS.get(name, {"Positive prompt": PROMPT}).items():
                    small = fill(small, title, text=prompt)
                for node in small.values():
                    if node["class_type"] == "Wan21Sampler" and not is_distilled:
                        node["inputs"].update(SAMPLING)
                clip = folder / f"{name}.mp4"
                clip.write_bytes(_run(server.client, small))
                _thumbnail(clip).save(WORKFLOWS / f"{name}.jpg", quality=85)


def _run(client, graph):
    """Return the bytes of the video a graph writes."""
    files = client.run(graph).files
    return client.download(next(file for file in files if file["filename"].endswith(".mp4")))


def _thumbnail(clip):
    sheet = contact_sheet(read_frames(clip), PICTURES)
    return sheet.resize((WIDTH, round(sheet.height * WIDTH / sheet.width)))


if __name__ == "__main__":
    main()
