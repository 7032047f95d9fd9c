"""Turn a still image into `demo.mp4` by `workflows/api/Wan2.1 image to video (i2v).json` on a real ComfyUI.

Every option is also read from the environment variable of the same name in capitals, which is how
`make demo IMAGE=cat.jpg PROMPT="zoom in"` passes it on.
"""

import argparse
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from lib import bundled, pack
from lib.comfy_client import GraphRejected, JobFailed, fill, without
from lib.contact_sheet import contact_sheet, read_frames
from lib.host_server import HostServer
from lib.pack import ROOT, comfyui_path

pack.load_pack()

from wan21.wan.device import multiplies_in_bf16  # noqa: E402

WORKFLOW = ROOT / "workflows" / "api" / "Wan2.1 image to video (i2v).json"
WORK_FOLDER = ROOT / "build" / "demo"
VIDEO = ROOT / "demo.mp4"
SHEET = ROOT / "demo.jpg"
TIMEOUT_S = 3600


def main():
    """Read the options, run the graph on a fresh server, write the video and its contact sheet."""
    options = arguments()
    _check_image(options.image)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped."))  # so that the server is stopped, too
    try:
        video = _run_on_server(options)
    except (GraphRejected, JobFailed, ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        sys.exit(f"The demo failed. {error}\nThe server's log: {WORK_FOLDER / 'server.log'}")
    except KeyboardInterrupt:
        sys.exit("Stopped.")
    VIDEO.write_bytes(video)
    contact_sheet(read_frames(VIDEO)).save(SHEET, quality=90)
    print(f"video          {VIDEO}\ncontact sheet  {SHEET}")


def arguments():
    def option(name, convert, default, help_text):
        value = os.environ.get(name.upper()) or default
        parser.add_argument(f"--{name}", type=convert, default=value, help=f"{help_text} [{default}]")

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    option("image", Path, str(comfyui_path() / "input" / "example.png"), "still image to start from")
    option("prompt", str, "pan right", "what should happen in the video")
    option("seed", int, 0, "the same seed gives the same video; -1 draws one")
    option("steps", int, 20, "sampling steps")
    option("width", int, 96, "width of the video in pixels, a multiple of 16")
    option("height", int, 96, "height of the video in pixels, a multiple of 16")
    option("frames", int, 17, "number of frames, 4n + 1")
    option("workers", int, 1, "processes that share each step, one a GPU or all on the CPU; needs Ray")
    return parser.parse_args()


def _check_image(path):
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.verify()
    except FileNotFoundError:
        sys.exit(f"There is no image at {path}. Set IMAGE to the path of a picture.")
    except OSError as error:
        sys.exit(f"{path} is not an image that can be read: {error}")


def _run_on_server(options):
    shutil.rmtree(WORK_FOLDER, ignore_errors=True)
    print("Starting ComfyUI")
    with HostServer(WORK_FOLDER) as server:
        video = make_video(server.client, options)
        print(*(line for line in server.log().splitlines() if "workers: " in line), sep="\n")
        return video


def make_video(client, options):
    """Return the bytes of the mp4 that the graph writes."""
    image = client.upload_image(options.image)
    graph = _filled_graph(options, image)
    job = client.run(graph, on_event=_ProgressBars(graph), timeout_s=TIMEOUT_S)
    video = next(file for file in job.files if file["filename"].endswith(".mp4"))
    return client.download(video)


def _filled_graph(options, image):
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    graph = without(graph, "CLIPVisionLoader", "CLIPVisionEncode")  # 1.3 GB; their features are optional
    dtype = "bf16" if multiplies_in_bf16("cpu") else "default"  # a fifth faster and more
    graph = fill(graph, "Wan21ModelLoader", model_name=bundled.FILES["model_name"], weight_dtype=dtype)
    graph = fill(graph, "Wan21TextEncoderLoader", text_encoder_name=bundled.FILES["text_encoder_name"])
    graph = fill(graph, "Wan21VAELoader", vae_name=bundled.FILES["vae_name"])
    graph = fill(graph, "LoadImage", image=image)
    graph = fill(graph, "Positive prompt", text=options.prompt)
    size = {"width": options.width, "height": options.height, "num_frames": options.frames}
    graph = fill(graph, "Wan21ImageToVideo", **size)
    graph = fill(graph, "Wan21Sampler", seed=options.seed, steps=options.steps)
    return graph if options.workers == 1 else with_workers(graph, options.workers)


def with_workers(graph, count):
    """The graph with Wan2.1 Workers before its sampler and its decode."""
    inputs = {"devices": count, "split": "auto"}
    graph = graph | {"workers": {"class_type": "Wan21Workers", "inputs": inputs}}
    for output, (kind, name) in enumerate((("Wan21Sampler", "model"), ("Wan21VAEDecode", "vae"))):
        key, node = next((k, node) for k, node in graph.items() if node["class_type"] == kind)
        inputs[name] = node["inputs"][name]
        graph[key] = node | {"inputs": node["inputs"] | {name: ["workers", output]}}
    return graph


class _ProgressBars:
    """One bar for each node that reports progress, fed by the host's own messages."""

    def __init__(self, graph):
        self.graph = graph
        self.node_id = None
        self.bar = None

    def __call__(self, kind, data):
        if kind == "executing":
            self._close()
        elif kind == "progress":
            self._show(data["node"], data["value"], data["max"])

    def _show(self, node_id, value, total):
        from tqdm import tqdm

        if self.bar is None or node_id != self.node_id:
            self._close()
            self.node_id = node_id
            self.bar = tqdm(total=total, desc=self.graph[node_id]["class_type"])
        self.bar.update(value - self.bar.n)

    def _close(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None


if __name__ == "__main__":
    main()
