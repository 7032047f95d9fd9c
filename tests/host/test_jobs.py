"""Jobs as an API client sees them: progress, previews, cancel, drawn seeds and errors."""

import copy
import io
import json
import re

import pytest
from lib.comfy_client import GraphRejected, JobFailed, JobInterrupted, fill, find_node
from lib.pack import ROOT, comfyui_path
from lib.small_graphs import small_graph
from PIL import Image

SIZE, NUM_FRAMES, STEPS = (64, 48), 5, 3


@pytest.fixture(scope="module")
def graph(server):
    image = server.client.upload_image(comfyui_path() / "input" / "example.png")
    path = ROOT / "workflows" / "api" / "Wan2.1 image to video (i2v).json"
    api = json.loads(path.read_text(encoding="utf-8"))
    small = small_graph(api, SIZE, NUM_FRAMES, image=image, video=None)
    source = {"source": [find_node(small, "Wan21Sampler"), 1]}
    small["report"] = {"class_type": "PreviewAny", "inputs": source, "_meta": {"title": "Report"}}
    return fill(small, "Wan21Sampler", steps=STEPS)


def report_of(graph, job):
    return job.outputs[find_node(graph, "PreviewAny")]["text"][0]


def test_progress_and_previews_reach_the_client(client, graph):
    job = client.run(fill(graph, "Wan21Sampler", seed=101))
    sampler = find_node(graph, "Wan21Sampler")
    bars = [
        data["nodes"][sampler]["value"]
        for kind, data in job.events
        if kind == "progress_state" and sampler in data["nodes"]
    ]
    assert bars == sorted(bars) and {1, 2, 3} <= set(bars)
    assert len(job.previews) == STEPS + 1  # the last of what is finished
    strip = Image.open(io.BytesIO(job.previews[-1]))
    assert strip.format == "JPEG"
    assert strip.width / strip.height == pytest.approx(2 * SIZE[0] / SIZE[1], rel=0.05)  # two latent frames


def test_seed_minus_one_runs_again_and_a_fixed_seed_is_cached(client, graph):
    drawn = fill(graph, "Wan21Sampler", seed=-1)
    seeds = [re.search(r"seed: (\d+)", report_of(drawn, client.run(drawn)))[1] for _ in range(2)]
    assert seeds[0] != seeds[1]
    fixed = fill(graph, "Wan21Sampler", seed=102)
    sampler = find_node(graph, "Wan21Sampler")
    client.run(fixed)
    cached = [data["nodes"] for kind, data in client.run(fixed).events if kind == "execution_cached"]
    assert sampler in cached[0]


def test_cancel_stops_at_once_and_the_next_job_is_the_same(client, graph):
    job = fill(graph, "Wan21Sampler", seed=103, steps=STEPS)
    first = report_of(job, client.run(job))
    long = fill(graph, "Wan21Sampler", seed=104, steps=1000)
    sampler = find_node(graph, "Wan21Sampler")
    done = [0]

    def cancel_when_sampling(kind, data):
        if kind == "progress_state" and sampler in data["nodes"]:
            done.append(data["nodes"][sampler]["value"])
            if done[-2] < 2 <= done[-1]:
                client.interrupt()

    with pytest.raises(JobInterrupted):
        client.run(long, on_event=cancel_when_sampling)
    assert max(done) < 100  # of 1000 steps: what the host computes until it hears of it
    again = fill(job, "Wan21Sampler", seed=105)
    assert timeless(report_of(again, client.run(again))) == timeless(first).replace("seed: 103", "seed: 105")


def timeless(report):
    return "\n".join(line for line in report.splitlines() if not line.startswith(("time:", "memory:")))


@pytest.mark.parametrize(
    "node, inputs, message",
    [
        ("Wan21ImageToVideo", {"num_frames": 80}, "num_frames is 80"),
        ("Wan21ImageToVideo", {"width": 70}, "width is 70"),
        ("Wan21Sampler", {"steps": 0}, "steps"),
        ("Wan21Sampler", {"solver": "ddim"}, "solver"),
        ("Wan21ModelLoader", {"model_name": "none.safetensors"}, "model_name"),
    ],
)
def test_bad_values_are_refused_before_anything_runs(client, graph, node, inputs, message):
    with pytest.raises(GraphRejected, match=message):
        client.queue(fill(graph, node, **inputs))


def test_a_failed_check_names_the_node_to_the_client(client, graph):
    wrong = copy.deepcopy(graph)
    wrong[find_node(graph, "Wan21Sampler")]["inputs"] |= {"skip_layers": "on", "skip_layers.layers": "99"}
    with pytest.raises(JobFailed, match=r"Wan21Sampler: .*block 99.*0 to 5") as failed:
        client.run(wrong)
    assert not failed.value.job.previews
