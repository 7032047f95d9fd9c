"""Whole graphs on a server, ours beside the host's own nodes: load, encode, sample, decode, write the video.

Both take the bundled DiT and VAE. The host has no loader for so small an umT5, so both take ours.
"""

import json
import statistics
import time

from . import bundled
from .comfy_client import fill, find_node
from .pack import ROOT, comfyui_path

QUICK_START = ROOT / "workflows" / "api" / "Wan2.1 - quick start.json"
SIZES = ((64, 17), (128, 17), (128, 33))  # width and height, frames
STEPS = 20


def our_graph(side, num_frames, steps, dtype="default"):
    """The quick start."""
    graph = json.loads(QUICK_START.read_text(encoding="utf-8"))
    graph = fill(graph, "Image to video", width=side, height=side, num_frames=num_frames)
    graph = fill(graph, "Model", weight_dtype=dtype)
    return fill(graph, "Sampler", steps=steps)


def native_graph(side, num_frames, steps):
    """The quick start with the host's nodes in place of ours, all but the text encoder's."""
    graph = our_graph(side, num_frames, steps)
    ids = {name: find_node(graph, name) for name in ("Model", "VAE", "Image to video", "Sampler", "Decode")}
    encoded, sampler = (graph[ids[name]]["inputs"] for name in ("Image to video", "Sampler"))

    def put(name, class_type, **inputs):
        graph[ids[name]] = {"class_type": class_type, "inputs": inputs, "_meta": {"title": name}}

    linked = {name: encoded[name] for name in ("positive", "negative", "vae", "start_image")}
    put("Model", "UNETLoader", unet_name=bundled.MODEL, weight_dtype="default")
    put("VAE", "VAELoader", vae_name=bundled.VAE)
    put(
        "Image to video",
        "WanImageToVideo",
        width=side,
        height=side,
        length=num_frames,
        batch_size=1,
        **linked,
    )
    graph["shift"] = {
        "class_type": "ModelSamplingSD3",
        "inputs": {"model": sampler["model"], "shift": sampler["flow_shift"]},
    }
    put(
        "Sampler",
        "KSampler",
        model=["shift", 0],
        positive=sampler["positive"],
        negative=sampler["negative"],
        latent_image=sampler["latent"],
        seed=0,
        steps=steps,
        cfg=sampler["guidance_scale"],
        sampler_name="uni_pc",
        scheduler="simple",
        denoise=1.0,
    )
    put("Decode", "VAEDecode", samples=[ids["Sampler"], 0], vae=[ids["VAE"], 0])
    return graph


def race(server, side, num_frames, steps=STEPS, repeat=3, in_bf16=False):
    """The graphs in turns, each from nothing loaded, after one of each that warms the server up.

    Args:
        server: a running `HostServer`.
        side, num_frames, steps: of the video, of the sampler.
        repeat: runs of each.
        in_bf16: whether ours runs with weight_dtype bf16 as well.

    Returns:
        {"ours": median seconds, "ours bf16": ..., "native": ...}
    """
    server.client.upload_image(comfyui_path() / "input" / "example.png")
    graphs = {"ours": our_graph(side, num_frames, steps)}
    if in_bf16:
        graphs["ours bf16"] = our_graph(side, num_frames, steps, "bf16")
    graphs["native"] = native_graph(side, num_frames, steps)
    seconds = {name: [] for name in graphs}
    for turn in range(repeat + 1):
        for name, graph in graphs.items():
            server.client.free()
            start = time.perf_counter()
            job = server.client.run(fill(graph, "Sampler", seed=turn), timeout_s=3600)
            assert job.files, "the graph wrote no video"
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
