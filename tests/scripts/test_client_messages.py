"""What the scripts' client says of a node that failed."""

import pytest
from lib.comfy_client import ComfyClient, JobFailed


@pytest.mark.parametrize(
    "message, told",
    [
        ("steps is 0. Set 1 or more.\n", "Wan21Sampler (node 10): steps is 0. Set 1 or more."),
        ("Wan21Sampler: steps is 0. Set 1 or more.\n", "Wan21Sampler: steps is 0. Set 1 or more. (node 10)"),
    ],
)
def test_a_failed_node_is_named_once(monkeypatch, message, told):
    error = {"node_type": "Wan21Sampler", "node_id": "10", "exception_message": message}
    record = {"outputs": {}, "status": {"messages": [["execution_error", error]]}}
    client = ComfyClient("http://127.0.0.1:1")
    monkeypatch.setattr(client, "history", lambda prompt_id: record)
    with pytest.raises(JobFailed) as failed:
        client.wait("x")
    assert str(failed.value) == told
