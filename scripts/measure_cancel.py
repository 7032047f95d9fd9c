"""How long a real ComfyUI works on after a cancel, in the nodes that encode, decode and upsample.

    python scripts/measure_cancel.py [--width 832] [--height 480] [--frames 81]

A VAE of the release's size with random weights; each job is cancelled some seconds after its node began.
Prints a Markdown table: seconds from the cancel to the host's word that the job has ended.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402
from lib.comfy_client import JobInterrupted  # noqa: E402
from lib.host_server import HostServer  # noqa: E402
from lib.random_weights import randomise  # noqa: E402
from lib.small_graphs import panning_clip  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from wan21.wan.vae import WanVAE  # noqa: E402

AFTER = (1.0, 3.0, 6.0, 10.0)  # seconds
PICTURE = pack.comfyui_path() / "input" / "example.png"


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def graphs(size, frames, video):
    """{what: (graph in which node "9" is the one to cancel)}"""
    width, height = size
    vae = {"1": node("Wan21VAELoader", vae_name="full.safetensors", precision="fp32")}
    latent = {"2": node("EmptyHunyuanLatentVideo", width=width, height=height, length=frames, batch_size=1)}
    clip = {"1": node("LoadVideo", file=video), "2": node("GetVideoComponents", video=["1", 0])}
    words = {
        "3": node(
            "Wan21TextEncoderLoader", text_encoder_name="wan21-tiny-umt5.safetensors", device="default"
        ),
        "4": node("CLIPTextEncode", text="pan left", clip=["3", 0]),
        "5": node("LoadImage", image="picture.png"),
    }
    image_to_video = node(
        "Wan21ImageToVideo", positive=["4", 0], negative=["4", 0], vae=["1", 0], start_image=["5", 0],
        width=width, height=height, num_frames=frames, resize_mode="crop", add_frames_for_end_image=False,
        tile_size="auto",
    )  # fmt: skip

    def decode(tile):
        return vae | latent | {"9": node("Wan21VAEDecode", vae=["1", 0], latent=["2", 0], tile_size=tile)}

    def upsample(class_type, **inputs):
        return clip | {"9": node(class_type, images=["2", 0], **inputs)}

    return {
        "encode (Image to Video)": vae | words | {"9": image_to_video},
        "decode, whole frames": decode("0"),
        "decode, tiles of 256": decode("256"),
        "x4 in time, FFmpeg": upsample("Wan21TemporalUpsample", fps=16, method="x4", scene_cut_threshold=0.5),
        "x2 in space, Lanczos": upsample("Wan21SpatialUpsample", method="lanczos2"),
    }


def seconds_to_stop(client, graph, after):
    """Of a job that is cancelled `after` seconds into node "9"; None if it had finished by then."""
    asked, timers = [], []
    graph = graph | {"10": node("PreviewAny", source=["9", 0])}

    def cancel():
        asked.append(time.monotonic())
        client.interrupt()

    def watch(kind, data):
        if kind == "executing" and data["node"] == "9":
            timers.append(threading.Timer(after, cancel))
            timers[0].start()

    try:
        client.run(graph, on_event=watch, timeout_s=600)
    except JobInterrupted:
        return time.monotonic() - asked[0]
    for timer in timers:  # none if the host still had the result
        timer.cancel()
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=81)
    args = parser.parse_args()
    size = (args.width, args.height)
    with tempfile.TemporaryDirectory() as folder, HostServer(folder) as server:
        (Path(folder) / "models" / "vae").mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.half() for name, tensor in randomise(WanVAE()).state_dict().items()}
        save_file(weights, Path(folder) / "models" / "vae" / "full.safetensors")
        (server.input_directory / "clip.mp4").write_bytes(panning_clip(PICTURE, size, args.frames, 16))
        server.client.upload_image(PICTURE, "picture.png")
        print("| cancelled in | longest of so many | seconds until the job had ended |\n|---|---|---|")
        for what, graph in graphs(size, args.frames, "clip.mp4").items():
            seconds = [seconds_to_stop(server.client, graph, after) for after in AFTER]
            stopped = [s for s in seconds if s is not None]
            longest = f"{max(stopped):.2f}" if stopped else "it was done before"
            print(f"| {what} | {len(stopped)} | {longest} |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
