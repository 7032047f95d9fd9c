"""The API over a host that tests move on by hand, and a start image."""

import pytest
from lib import pack
from PIL import Image

pack.load_host()


@pytest.fixture
def host(tmp_path, checkpoints):
    from helpers_server import FakeHost

    return FakeHost(tmp_path, checkpoints)


@pytest.fixture
def api(host):
    from helpers_server import serve

    with serve(host) as running:
        yield running


@pytest.fixture
def image(tmp_path):
    """Path of a small picture, as text: the client uploads it."""
    path = tmp_path / "start.png"
    Image.new("RGB", (80, 64), "teal").save(path)
    return str(path)


@pytest.fixture
def job(image):
    """Makes a run request; keywords replace fields of its input."""

    def make(params=None, **fields):
        small = {"size": "64*64", "num_frames": 5, "num_inference_steps": 3}
        given = {"prompt": "pan left", "image": image} | small | fields
        return {"app": "infsh/wan2-1-i2v", "input": given} | (params or {})

    return make
