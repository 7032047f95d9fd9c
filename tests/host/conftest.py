"""One real ComfyUI server for all tests of a session; its models are those that the pack brings."""

import pytest
from lib.host_server import HostServer, group_lives


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """The running server; `server.client` talks to it."""
    previews = ["--preview-method", "auto"]
    with HostServer(tmp_path_factory.mktemp("host"), extra_args=previews) as running:
        group = running.process.pid
        yield running
    assert not group_lives(group), "the server left a process behind"


@pytest.fixture
def client(server):
    """A client of the running server."""
    return server.client
