"""What a real host refuses before the first node runs, and so not after hours of sampling.

One wrong value is one entry, filed under the input that it is about.
"""

import json
import urllib.error

import pytest
from helpers_refused import IMAGE_TO_VIDEO, JOIN, REFUSED, UPSAMPLE, graph_with
from lib.pack import comfyui_path


@pytest.fixture
def complaints(client):
    """Queues a graph. -> what the host answers: {node id: [(input, sentence)]}"""
    client.upload_image(comfyui_path() / "input" / "example.png")

    def queue(graph, route="/prompt"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            client.post(route, {"prompt": graph})
        assert caught.value.code == 400
        return {
            node: [(entry["extra_info"].get("input_name"), entry["details"]) for entry in found["errors"]]
            for node, found in json.load(caught.value)["node_errors"].items()
        }

    return queue


@pytest.mark.parametrize("case", REFUSED)
def test_one_wrong_value_is_one_entry(case, complaints):
    (node, changed), name, sentence = REFUSED[case]
    assert complaints(graph_with(node, changed)) == {node: [(name, sentence)]}


def test_the_editor_asks_by_another_route(complaints):
    (node, changed), name, sentence = REFUSED["frames"]
    assert complaints(graph_with(node, changed), "/api/prompt") == {node: [(name, sentence)]}


def test_two_nodes_are_two_entries(complaints):
    graph = graph_with(IMAGE_TO_VIDEO, {"num_frames": 80})
    graph[UPSAMPLE]["inputs"]["method"] = "model"
    assert {node: [name for name, _ in found] for node, found in complaints(graph).items()} == {
        IMAGE_TO_VIDEO: ["num_frames"],
        UPSAMPLE: ["method"],
    }


@pytest.mark.parametrize(
    "node, name, value",
    [(IMAGE_TO_VIDEO, "num_frames", "many"), (IMAGE_TO_VIDEO, "width", None), (JOIN, "overlap", "a")],
)
def test_what_is_no_number_is_the_hosts_to_refuse(node, name, value, complaints):
    [(found, sentence)] = complaints(graph_with(node, {name: value}))[node]
    assert found == name and f"{value}" in sentence


def test_an_answer_that_only_names_a_refusal_is_the_hosts(client):
    """A class that nobody has, called as our exception is."""
    with pytest.raises(urllib.error.HTTPError) as caught:
        client.post("/prompt", {"prompt": {"1": {"class_type": "Refusal", "inputs": {}}}})
    answer = json.load(caught.value)
    assert caught.value.code == 400 and answer["error"]["type"] == "missing_node_type"
    assert answer["node_errors"] == {}


def test_another_packs_answer_is_left_alone(complaints):
    graph = graph_with("4", {"image": "nobody.png"})
    [(name, sentence)] = complaints(graph)["4"]
    assert name == "image" and sentence == "image - Invalid image file: nobody.png"


@pytest.mark.usefixtures("complaints")
def test_a_part_that_can_run_is_run_and_the_other_named(client):
    """The host's way with a graph of which some outputs are in order."""
    (node, changed), name, sentence = REFUSED["frames"]
    graph = graph_with(node, changed)
    graph["11"] = {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}}
    answer = client.post("/prompt", {"prompt": graph})
    client.wait(answer["prompt_id"])
    [entry] = answer["node_errors"][node]["errors"]
    assert entry["extra_info"] == {"input_name": name}, "no traceback, no paths of this machine"
    assert entry["message"] == "Refused" and entry["details"] == sentence


def test_a_connected_model_is_not_missing(complaints):
    graph = graph_with(UPSAMPLE, {"method": "model", "upscale_model": ["11", 0]})
    graph["11"] = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "of nobody.pth"}}
    assert list(complaints(graph)) == ["11"]
