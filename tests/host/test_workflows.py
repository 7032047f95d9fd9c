"""Every graph in workflows/api runs on a real host, small, and gives the video it promises."""

import io
import json
from fractions import Fraction

import av
import pytest
from lib.comfy_client import find_node
from lib.pack import ROOT, comfyui_path
from lib.small_graphs import panning_clip, small_graph
from wan21.host.node_inputs import describe_inputs

WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
SIZE = (96, 64)
NUM_FRAMES = 9
SOURCE_FPS = 12

pytestmark = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def image(server):
    return server.client.upload_image(comfyui_path() / "input" / "example.png")


@pytest.fixture(scope="module")
def video(server):
    """A clip of another size and one frame more than the graphs read."""
    clip = panning_clip(comfyui_path() / "input" / "example.png", (128, 80), NUM_FRAMES + 1, SOURCE_FPS)
    return server.client.upload_image(clip, name="source.mp4")


def test_runs(path, client, image, video):
    graph = small_graph(
        json.loads(path.read_text(encoding="utf-8")), SIZE, NUM_FRAMES, image=image, video=video
    )
    job = client.run(graph)
    frames, fps = read_video(client, job)
    num_frames, size = expected_clip(graph)
    assert len(frames) == num_frames
    assert {(frame.width, frame.height) for frame in frames} == {size}
    assert fps == expected_fps(graph)
    cached = {i for kind, data in job.events if kind == "execution_cached" for i in data["nodes"]}
    said = dict(job.texts)  # a node's text holds all that it has said
    assert not said.keys() & set(nodes_of(graph, "Wan21VAEDecode")), "it speaks of tiles alone"
    samplers = set(nodes_of(graph, "Wan21Sampler"))
    assert {node for node, text in said.items() if "s per step" in text} == samplers - cached


def nodes_of(graph, kind):
    return [node_id for node_id, node in graph.items() if node["class_type"] == kind]


def read_video(client, job):
    [file] = [file for file in job.files if file["filename"].endswith(".mp4")]
    with av.open(io.BytesIO(client.download(file))) as container:
        return list(container.decode(video=0)), container.streams.video[0].average_rate


def expected_clip(graph):
    """(frames, (width, height)): what was sampled and joined, or x2 in time and 1.5x in space."""
    kinds = {node["class_type"] for node in graph.values()}
    num_frames = 2 * NUM_FRAMES - 1 if "Wan21TemporalUpsample" in kinds else NUM_FRAMES
    num_frames += sum(NUM_FRAMES - graph[i]["inputs"]["overlap"] for i in nodes_of(graph, "Wan21JoinClips"))
    return num_frames, (SIZE[0] * 3 // 2, SIZE[1] * 3 // 2) if "Wan21SpatialUpsample" in kinds else SIZE


def expected_fps(graph):
    """Wan2.1's 16, the source's where the graph takes it from there, or x2 after interpolation."""
    fps = graph[find_node(graph, "CreateVideo")]["inputs"]["fps"]
    if not isinstance(fps, list):
        return Fraction(fps)
    interpolated = graph[fps[0]]["class_type"] == "Wan21TemporalUpsample"
    return Fraction(32 if interpolated else SOURCE_FPS)


def test_nodes_and_inputs_are_the_hosts(path, client):
    known = client.object_info()
    for node in json.loads(path.read_text(encoding="utf-8")).values():
        assert node["class_type"] in known
        inputs = known[node["class_type"]]["input"]
        required = inputs.get("required", {})
        title = node["_meta"]["title"]
        assert required.keys() <= node["inputs"].keys(), f"{title} lacks inputs"
        assert node["inputs"].keys() <= describe_inputs(inputs).keys(), f"{title} has unknown inputs"


def test_joined_clips_share_the_frames_that_the_second_took(path):
    """Join -> the second clip's frames -> sampler -> image to video -> the last frames of the clip before."""
    graph = json.loads(path.read_text(encoding="utf-8"))

    def above(node_id, name):
        return graph[node_id]["inputs"][name][0]

    for join in nodes_of(graph, "Wan21JoinClips"):
        start = above(above(above(above(join, "images_2"), "latent"), "latent"), "start_image")
        overlap = graph[join]["inputs"]["overlap"]
        assert (graph[start]["inputs"]["batch_index"], graph[start]["inputs"]["length"]) == (
            -overlap,
            overlap,
        )
        before = above(join, "images_1")
        before = above(before, "images_2") if graph[before]["class_type"] == "Wan21JoinClips" else before
        assert above(start, "image") == before


def test_titles_are_unique(path):
    """Demo, tests and users fill graphs in by title."""
    titles = [node["_meta"]["title"] for node in json.loads(path.read_text(encoding="utf-8")).values()]
    assert len(titles) == len(set(titles))
