"""The host's modules in this process, for the tests that import them."""

import pytest
from lib import pack

pack.load_host()

import torch  # noqa: E402


@pytest.fixture(autouse=True)
def in_inference_mode():
    """As the host runs nodes."""
    with torch.inference_mode():
        yield
