"""One real ComfyUI server for all tests of a session, with small random checkpoints."""

import pytest
from host_server import HostServer, group_lives
from make_random_checkpoints import make_checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A `models` folder with the small random checkpoints."""
    return make_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def server(tmp_path_factory, checkpoints):
    """The running server; `server.client` talks to it."""
    previews = ["--preview-method", "auto"]
    with HostServer(tmp_path_factory.mktemp("host"), checkpoints, extra_args=previews) as running:
        group = running.process.pid
        yield running
    assert not group_lives(group), "the server left a process behind"


@pytest.fixture
def client(server):
    """A client of the running server."""
    return server.client
