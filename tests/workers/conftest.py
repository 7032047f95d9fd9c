"""The host in this process, in inference mode as it runs nodes; one engine for all tests."""

from pathlib import Path

import pytest
from helpers_host import in_inference_mode  # noqa: F401


@pytest.fixture(scope="session")
def client():
    """The engine's handle, which the node takes for its own."""
    from wan21 import host, workers
    from wan21.nodes import workers as node

    settings, paths = host.process_settings()
    here = str(Path(__file__).parent)
    client = workers.Client(workers.Setup(2, False, settings, (*paths, here), 1), hung_seconds=3)
    node._engines[2, False] = client
    yield client
    client.close()
