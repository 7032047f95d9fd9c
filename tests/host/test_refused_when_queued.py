"""What a real host refuses before the first node runs, and so not after hours of sampling."""

import json

import pytest
from lib.comfy_client import GraphRejected, fill
from lib.pack import ROOT

UPSCALED = ROOT / "workflows" / "api" / "upscaled.json"


@pytest.fixture
def refusal(client):
    """Queues the upscaled graph with inputs of its spatial upsampling changed. -> why it is refused"""

    def queue(more, **inputs):
        graph = json.loads(UPSCALED.read_text(encoding="utf-8")) | more
        graph = fill(graph, "Wan21SpatialUpsample", **inputs)
        with pytest.raises(GraphRejected) as caught:
            client.queue(graph)
        return str(caught.value)

    return queue


def test_a_missing_upscale_model(refusal):
    assert "upscale_model is not connected. Connect Load Upscale Model" in refusal({}, method="model")


def test_a_connected_one_is_not_missing(refusal):
    loader = {"class_type": "UpscaleModelLoader", "inputs": {"model_name": "of nobody.pth"}}
    said = refusal({"900": loader}, method="model", upscale_model=["900", 0])
    assert "of nobody.pth" in said and "not connected" not in said


def test_an_unknown_method(refusal):
    assert "choose one of none, lanczos1.5" in refusal({}, method="bicubic")
