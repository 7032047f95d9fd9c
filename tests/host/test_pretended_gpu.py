"""Graphs and nodes on a GPU that is pretended (tests/pretended_gpu): the devices fit, and so do the numbers.

What the pack does on a GPU is not what it does on a CPU: weights and latents change places, and other code
runs. Real kernels and real memory are for tests/gpu.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
from xml.etree import ElementTree

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
KINDS = ("failure", "error", "skipped")  # of what did not pass, in the XML that pytest writes
GRAPHS = [
    "Wan2.1 image to video TeaCache",
    "Wan2.1 first and last frame (flf2v)",
    "Wan2.1 image to video low VRAM",
    "Wan2.1 image to video upscaled",
    "Wan2.1 video to video (v2v)",
]
# Test files by whether weights come to the device at their use, and what is left out of them: it goes on on
# the CPU where there is a GPU, gives models tensors of the CPU, or looks at weights before their use; or it
# is long and asks no more of a device than others do: noise levels, words of a refusal, files, further sizes.
NODES = {
    True: [
        "test_host_model",
        "test_weights",
        "test_reader",
        "test_gguf",
        "test_host_kernels",
        "test_lora",
        "test_lora_copies",
        "test_sampler",
        "test_streamed",
    ],
    False: [
        "test_host_vae",
        "test_vae_decode",
        "test_memory",
        "test_image_to_video",
        "test_upsample",
        "test_clips",
    ],
}
LEFT_OUT = {
    True: "test_weight_dtype or test_fp8_stores or cannot_hold or test_each_step_has or "
    "told_apart or is_named or is_told_of or is_fetched_once",
    False: "test_an_error_names_the_file_that_resumes or released_lengths or alpha_channel or "
    "chooses_the_size or of_several_is_read or prompts_are_not_changed or (is_resized and not crop) or "
    "(several_start_frames and size1) or (left_out_in_front and not 2-1)",
}

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
    assert (
        metrics.psnr(
            frames(start(), "Wan2.1 image to video low VRAM"),
            frames(server, "Wan2.1 image to video low VRAM"),
        )
        > 30
    )


@pytest.fixture(scope="module")
def run_nodes(tmp_path_factory):
    """Runs the files of NODES in one process, once. -> (its whole output, {file: its test cases})"""

    @functools.cache
    def run(at_use):
        results = tmp_path_factory.mktemp("nodes") / "results.xml"
        command = [sys.executable, "-m", "pytest", "-p", "pretended_plugin", f"--junitxml={results}"]
        command += ["-k", f"not ({LEFT_OUT[at_use]})", *(f"tests/nodes/{name}.py" for name in NODES[at_use])]
        environment = os.environ | {"PYTHONPATH": str(FOLDER), "PRETENDED_AIMDO": str(int(at_use))}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        said = done.stdout[-8000:] + done.stderr[-2000:]
        assert results.exists(), said
        cases = {}
        for case in ElementTree.parse(results).iter("testcase"):
            cases.setdefault(case.get("classname").split(".")[-1], []).append(case)
        return said, cases

    return run


@pytest.mark.parametrize(
    "at_use, name",
    [
        pytest.param(at_use, name, id=name, marks=pytest.mark.xdist_group(f"pretended-{at_use}"))
        for at_use in NODES
        for name in NODES[at_use]
    ],
)
def test_the_nodes_pass_their_tests(run_nodes, at_use, name):
    said, cases = run_nodes(at_use)
    found = {kind: [case for case in cases[name] if case.find(kind) is not None] for kind in KINDS}
    bad = [
        f"{case.get('name')}: {case.find(kind).text}" for kind in ("failure", "error") for case in found[kind]
    ]
    assert not bad, "\n\n".join(bad)[-8000:]
    passed = len(cases[name]) - len(found["skipped"])
    assert passed > 5 * len(found["skipped"]), said
