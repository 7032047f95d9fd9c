"""Tests of a real ComfyUI server: the one of tests/conftest.py, where they start none of their own."""

import pytest
from lib import pack

pack.load_host()


@pytest.fixture
def client(server):
    """A client of the running server."""
    return server.client
