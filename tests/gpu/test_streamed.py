"""Weights streamed to a real GPU by the host's dynamic memory, blocks ahead: the plan and its peak."""

import json
import re
from dataclasses import replace

import pytest
import torch
from lib.comfy_client import fill, find_node, without
from lib.host_server import HostServer
from lib.pack import ROOT, comfyui_path
from lib.peers import random_dit
from lib.random_checkpoints import TEXT_DIM, TEXT_ENCODER, make_checkpoints
from safetensors.torch import save_file
from wan21.wan.config import SIZES

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not (comfyui_path() / "api_server").is_dir(), reason="needs ComfyUI's server"),
]
MODEL = "wan21-random-1.3b.safetensors"
ROOM_GIB = 3.2  # for a step and weights: of 2.6 GiB of weights a part stays
AFTER = ("Wan21VAELoader", "Wan21VAEDecode", "CreateVideo", "SaveVideo")


def make_model(folder, config):
    """A `models` folder with a t2v model of these sizes in bf16, random, and a text encoder for it."""
    make_checkpoints(folder)
    config = replace(config, text_dim=TEXT_DIM)
    weights = random_dit(config, torch.device("cuda"), torch.bfloat16).state_dict()
    told = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}
    cpu = {key: value.cpu() for key, value in weights.items()}
    save_file(cpu, folder / "diffusion_models" / MODEL, metadata=told)
    return folder


def graph(width, height, length):
    """From text to the sampler's report, two steps."""
    path = ROOT / "workflows" / "api" / "Wan2.1 text to video (t2v).json"
    api = without(json.loads(path.read_text(encoding="utf-8")), *AFTER)
    api = fill(api, "Wan21ModelLoader", model_name=MODEL)
    api = fill(api, "Wan21TextEncoderLoader", text_encoder_name=TEXT_ENCODER)
    api = fill(api, "EmptyHunyuanLatentVideo", width=width, height=height, length=length)
    report = {"class_type": "PreviewAny", "inputs": {"source": [find_node(api, "Wan21Sampler"), 1]}}
    return fill(api, "Wan21Sampler", steps=2) | {"report": report}


def memory_line(server, size):
    """What the report says of memory."""
    if "DynamicVRAM support detected and enabled" not in server.log():
        pytest.skip("ComfyUI's dynamic memory does not run on this machine")
    report = server.client.run(graph(*size)).outputs["report"]["text"][0]
    return next(line for line in report.splitlines() if line.startswith("memory:"))


def test_the_plan_with_blocks_fetched_ahead_is_near_the_peak(tmp_path):
    models = make_model(tmp_path / "models", SIZES["t2v-1.3B"])
    torch.cuda.empty_cache()
    left = torch.cuda.get_device_properties(0).total_memory / 2**30 - ROOM_GIB
    arguments = ["--reserve-vram", f"{left:.1f}"]
    with HostServer(tmp_path / "host", models_directory=models, extra_args=arguments) as server:
        line = memory_line(server, (832, 480, 81))
    print(f"\n{torch.cuda.get_device_name()}: {line}")
    assert "streamed in part" in line and "layer by layer" not in line
    patterns = r"([\d.]+) GiB estimated", r"peak ([\d.]+) GiB"
    estimated, peak = (float(re.search(pattern, line)[1]) for pattern in patterns)
    assert 0.85 < estimated / peak < 1.15, line
