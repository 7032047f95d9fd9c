"""What the host says, put into our words; the host's own modules are played here, tests/host runs them."""

import asyncio
import importlib
import json
import struct
import sys
from types import SimpleNamespace

import pytest


@pytest.fixture
def queue(monkeypatch):
    """`host.queue` between modules of a host that a test fills in."""
    prompt_server = SimpleNamespace(instance=SimpleNamespace(prompt_queue=None))
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=prompt_server))
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS={}))
    monkeypatch.setitem(sys.modules, "execution", SimpleNamespace())
    monkeypatch.delitem(sys.modules, "wan21.host.queue", raising=False)
    yield importlib.import_module("wan21.host.queue")
    del sys.modules["wan21.host.queue"]


def check(queue, *answer):
    """What `Host.check` makes of an answer of the host's `validate_prompt`."""

    async def validate_prompt(*_):
        return answer

    queue.execution.validate_prompt = validate_prompt
    return asyncio.run(queue.Host().check("p", {}))


CUSTOM = "Custom validation failed for node"


@pytest.mark.parametrize(
    "kind, said, details, message",
    [
        ("value_smaller_than_min", "Value 0 too small", "size", "Value 0 too small: size"),
        ("custom_validation_failed", CUSTOM, "size - is 5. Use 8.", "is 5. Use 8."),
        ("custom_validation_failed", CUSTOM, "size", f"{CUSTOM}: size"),
        ("exception_during_inner_validation", "Refused", "size is 5. Use 8.", "size is 5. Use 8."),
        ("value_not_in_list", "Value not in list", "size: 'a - b'", "Value not in list: size: 'a - b'"),
        ("dependency_cycle", "Dependency cycle detected", "", "Dependency cycle detected"),
    ],
)
def test_a_complaint_is_what_the_node_or_the_host_says(queue, kind, said, details, message):
    problem = {"type": kind, "message": said, "details": details, "extra_info": {"input_name": "size"}}
    errors = {"7": {"errors": [problem], "class_type": "Wan21ImageToVideo"}}
    assert check(queue, True, None, ["9"], errors) == (["9"], [("7", "size", message)])


def test_a_graph_that_is_refused_as_a_whole(queue):
    error = {"type": "missing_node_type", "message": "Node 'X' not found.", "details": "Node ID '#3'"}
    assert check(queue, False, error, [], {}) == ([], [("", "", "Node 'X' not found: Node ID '#3'")])


def test_other_binary_messages_are_no_previews(queue):
    metadata = json.dumps({"prompt_id": "p", "image_type": "image/png"}).encode()
    message = struct.pack(">II", queue.PREVIEW_WITH_METADATA, len(metadata)) + metadata + b"png"
    assert queue.read_preview(message) == {"prompt_id": "p", "image": b"png", "type": "image/png"}
    assert queue.read_preview(struct.pack(">I", 1) + b"png") is None


def text_message(queue, node_id, text):
    node = node_id.encode()
    return struct.pack(">II", queue.TEXT, len(node)) + node + text.encode()


def test_what_a_node_says_is_handed_on_with_the_job_that_runs(queue):
    """The host's message does not name the job; other clients' nodes have the same numbers."""
    told = []
    observer = queue.Observer(lambda kind, data: told.append((kind, data)))

    async def hear(*messages):
        for message in messages:
            await (
                observer.send_bytes(message) if isinstance(message, bytes) else observer.send_json(message)
            )

    start = {"type": "execution_start", "data": {"prompt_id": "p"}}
    end = {"type": "executing", "data": {"prompt_id": "p", "node": None}}
    said = text_message(queue, "10", "goes on in halves, ½")
    asyncio.run(hear(said, start, said, struct.pack(">II", queue.TEXT, 9) + b"\xff", end, said))
    assert [data for kind, data in told if kind == "progress_text"] == [
        {"prompt_id": "p", "node": "10", "text": "goes on in halves, ½"}
    ]
    asyncio.run(
        hear({"type": "execution_start", "data": ["of another pack"]}, {"type": "executing", "data": {}})
    )


def test_the_formats_are_those_of_the_host(queue):
    import comfy.quant_ops

    formats = queue.Host().weight_formats
    assert formats == (set(comfy.quant_ops.QUANT_ALGOS) if comfy.quant_ops._CK_AVAILABLE else set())
