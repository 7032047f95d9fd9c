"""The client that demo and tests use says clearly how a job ended."""

import time

import pytest
from lib import bundled, comfy_client
from lib.comfy_client import GraphRejected, JobFailed, JobInterrupted, fill

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255}},
    "2": {
        "class_type": "PreviewImage",
        "inputs": {"images": ["1", 0]},
        "_meta": {"title": "Preview"},
    },
}
# Encoding and decoding a long video with the native VAE takes far longer than a test.
LONG_GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 512, "height": 512, "batch_size": 33, "color": 1}},
    "2": {"class_type": "VAELoader", "inputs": {"vae_name": bundled.VAE}},
    "3": {"class_type": "VAEEncode", "inputs": {"pixels": ["1", 0], "vae": ["2", 0]}},
    "4": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["2", 0]}},
    "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
}


def test_run_returns_files_and_events(client):
    job = client.run(GRAPH)
    assert [file["filename"].endswith(".png") for file in job.files] == [True]
    assert client.download(job.files[0]).startswith(b"\x89PNG")
    assert job.events[-1][0] == "executing"


def test_rejected_graph_names_node_and_reason(client):
    with pytest.raises(GraphRejected, match=r"EmptyImage \(node 1\).*width"):
        client.run(fill(GRAPH, "EmptyImage", width=-1))


def test_failed_node_is_named(client, server):
    folder = server.models_directory / "vae"
    folder.mkdir(exist_ok=True)
    (folder / "broken.safetensors").write_bytes(b"not a checkpoint")
    graph = fill(LONG_GRAPH, "VAELoader", vae_name="broken.safetensors")
    with pytest.raises(JobFailed, match=r"VAELoader \(node 2\)"):
        client.run(graph)


def test_cancelled_job(client):
    def cancel_when_encoding(kind, data):
        if kind == "executing" and data["node"] == "3":
            assert client.cancel(data["prompt_id"])

    with pytest.raises(JobInterrupted):
        client.run(LONG_GRAPH, on_event=cancel_when_encoding)


def test_a_websocket_that_closes_late_takes_no_events_from_the_next_run(client, monkeypatch):
    left_open, queue = [], client.queue

    def queue_after_it_closed(*args):
        for events in left_open:
            events.loop.call_soon_threadsafe(events.task.cancel)
            while not events.loop.is_closed():
                time.sleep(0.01)
        return queue(*args)

    monkeypatch.setattr(comfy_client._Events, "__exit__", lambda events, *_: left_open.append(events))
    client.run(GRAPH)
    monkeypatch.undo()
    monkeypatch.setattr(client, "queue", queue_after_it_closed)
    assert client.run(GRAPH, timeout_s=60).events


def test_upload_image(client, server):
    name = client.upload_image(b"bytes of a picture", name="uploaded.png")
    assert (server.input_directory / name).read_bytes() == b"bytes of a picture"


def test_fill_finds_by_title_and_by_class():
    assert fill(GRAPH, "Preview", images=["9", 0])["2"]["inputs"]["images"] == ["9", 0]
    assert fill(GRAPH, "EmptyImage", width=32)["1"]["inputs"]["width"] == 32
    assert GRAPH["1"]["inputs"]["width"] == 64


@pytest.mark.parametrize("graph", [GRAPH, {**GRAPH, "3": GRAPH["1"], "4": GRAPH["1"]}])
def test_fill_refuses_unknown_and_ambiguous_names(graph):
    name = "EmptyImage" if len(graph) > 2 else "KSampler"
    with pytest.raises(ValueError, match=f"nodes of the graph are called '{name}'.*EmptyImage, Preview"):
        fill(graph, name)
