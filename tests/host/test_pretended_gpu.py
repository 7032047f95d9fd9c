"""Graphs and nodes on a GPU that is pretended (tests/pretended_gpu): the devices fit, and so do the numbers.

What the pack does on a GPU is not what it does on a CPU: weights and latents change places, and other code
runs. Real kernels and real memory are for tests/gpu.
"""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from lib.host_server import HostServer
from lib.pack import ROOT, comfyui_path
from lib.small_graphs import panning_clip, small_graph
from wan21.training import metrics
from wan21.training.host import Host

FOLDER = ROOT / "tests" / "pretended_gpu"
# Otherwise the host computes in 16 bits on a GPU.
FLOAT32 = ["--force-fp32", "--fp32-vae", "--fp32-text-enc"]
GRAPHS = ["fast", "first_last_frame", "low_memory", "upscaled", "video_to_video"]
# (file, whether weights come to the device at their use, what is left out: it has a kernel of its own, goes
# on on the CPU where there is a GPU, gives models tensors of the CPU, or looks at weights before their use)
NODES = [
    ("test_host_model", True, "test_weight_dtype or test_fp8_stores"),
    ("test_weights", True, "convrot_w4a4 or cannot_hold"),
    ("test_gguf", True, ""),
    ("test_lora", True, "test_each_step_has"),
    ("test_host_vae", False, ""),
    ("test_vae_decode", False, "test_an_error_names_the_file_that_resumes"),
    ("test_memory", False, ""),
    ("test_sampler", True, ""),
    ("test_image_to_video", False, ""),
    ("test_upsample", False, ""),
]

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU: tests/gpu")


class PretendedServer(HostServer):
    def _program(self):
        return [str(FOLDER / "serve.py"), *super()._program()]

    def _arguments(self, port):
        return [argument for argument in super()._arguments(port) if argument != "--cpu"]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts a server on the pretended GPU once for each set of arguments."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def started(*arguments):
            server = PretendedServer(tmp_path_factory.mktemp("gpu"), extra_args=arguments)
            stack.enter_context(server)
            assert "Device: cuda:0" in server.log()
            assert "DynamicVRAM support detected and enabled" in server.log()
            return server

        yield started


def frames(server, name):
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    picture = comfyui_path() / "input" / "example.png"
    image = server.client.upload_image(picture)
    clip = server.client.upload_image(panning_clip(picture, (64, 64), 5, 16), name="clip.mp4")
    return Host(server).frames(small_graph(graph, image=image, video=clip))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gives_the_video_of_the_cpu(server, start, name):
    error = (frames(start(*FLOAT32), name) - frames(server, name)).abs()
    assert error.max() <= 1.01 / 255  # rounding to 8 bits


def test_in_16_bits_the_video_is_nearly_that_of_the_cpu(server, start):
    assert metrics.psnr(frames(start(), "low_memory"), frames(server, "low_memory")) > 30


def run_tests(name, at_use, left_out):
    command = [sys.executable, "-m", "pytest", "-p", "pretended_plugin", f"tests/nodes/{name}.py"]
    return subprocess.run(
        command + ["-k", f"not ({left_out})"] * bool(left_out),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(FOLDER), "PRETENDED_AIMDO": str(int(at_use))},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def runs():
    """All of NODES, as many at once as there are cores: each takes one."""
    with ThreadPoolExecutor(min(4, os.cpu_count())) as pool:
        yield {case: pool.submit(run_tests, *case) for case in NODES}


@pytest.mark.parametrize("case", NODES, ids=[name for name, *_ in NODES])
def test_the_nodes_pass_their_tests(runs, case):
    done = runs[case].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])}
    assert counts["passed"] > 5 * counts.get("skipped", 0), done.stdout[-500:]
