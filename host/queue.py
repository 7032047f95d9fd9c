"""The host's prompt queue, node registry and folders, for the job API."""

import json
import logging
import secrets
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import comfy.model_management
import comfy.quant_ops
import execution
import folder_paths
from aiohttp import web

# The host's nodes.py and server.py; a type checker finds our own folders of these names.
from nodes import NODE_CLASS_MAPPINGS  # pyright: ignore[reportAttributeAccessIssue]
from server import PromptServer  # pyright: ignore[reportAttributeAccessIssue]

from .node_inputs import describe_inputs
from .refused import REFUSED, name_inputs

# Our client id at the host, which sends the progress of a job to its client alone. It is random because a
# websocket that gives the same id would replace ours.
OBSERVER = f"wan21-jobs-{secrets.token_hex(16)}"
TEXT, PREVIEW_WITH_METADATA = 3, 4  # the host's types of binary messages
_WORD = struct.Struct(">I")

Graph = dict[str, dict[str, Any]]  # node id -> {"class_type", "inputs", ...}
OnMessage = Callable[[str, dict[str, Any]], None]


class Complaint(NamedTuple):
    """What the host finds wrong with a graph.

    Attributes:
        node_id, input: place in the graph; empty for the graph as a whole.
        message: one sentence.
    """

    node_id: str
    input: str
    message: str


class Observer:
    """Behaves as one of the host's websockets, and hands messages to a function.

    Errors are logged here, because one in the host's publishing loop would end it for all clients.
    """

    def __init__(self, on_message: OnMessage):
        self._on_message = on_message
        self._running: str | None = None  # prompt id of our job, if one of ours runs

    async def send_json(self, message: dict[str, Any]) -> None:
        self.hear(message)

    async def send_bytes(self, message: bytes | bytearray) -> None:
        self.hear_bytes(message)

    def hear(self, message: dict[str, Any]) -> None:
        """Takes a message in JSON."""
        self._hand_on(message["type"], message["data"])

    def hear_bytes(self, message: bytes | bytearray) -> None:
        """Takes a preview, or what a node says."""
        try:
            preview, said = read_preview(bytes(message)), read_text(bytes(message))
        except (struct.error, ValueError, KeyError):
            return  # another pack's message
        if preview is not None:
            self._hand_on("preview", preview)
        if said is not None and self._running is not None:  # a text does not say of which prompt it is
            self._hand_on("progress_text", said | {"prompt_id": self._running})

    def _hand_on(self, kind: str, data: Any) -> None:
        if not isinstance(data, dict):
            return  # another pack's broadcast
        try:
            if kind == "execution_start":
                self._running = data["prompt_id"]
            elif kind == "executing" and data["node"] is None:
                self._running = None
            self._on_message(kind, data)
        except Exception:
            logging.exception("Wan2.1 jobs: message %s of the host was not understood", kind)


def read_preview(message: bytes) -> dict[str, Any] | None:
    """{"prompt_id", "image": bytes, "type"} of a preview message, None for other binary messages."""
    if _WORD.unpack_from(message)[0] != PREVIEW_WITH_METADATA:
        return None
    length = _WORD.unpack_from(message, _WORD.size)[0]
    start = 2 * _WORD.size + length
    metadata = json.loads(message[2 * _WORD.size : start])
    return {"prompt_id": metadata["prompt_id"], "image": message[start:], "type": metadata["image_type"]}


def read_text(message: bytes) -> dict[str, str] | None:
    """{"node", "text"} of what a node says while it runs, None for other binary messages."""
    if _WORD.unpack_from(message)[0] != TEXT:
        return None
    start = 2 * _WORD.size + _WORD.unpack_from(message, _WORD.size)[0]
    return {"node": message[2 * _WORD.size : start].decode(), "text": message[start:].decode()}


class Host:
    """This process's ComfyUI. Its methods are to be called on ComfyUI's event loop."""

    def __init__(self) -> None:
        self._server = PromptServer.instance
        self._queue = self._server.prompt_queue

    def mount(self, prefix: str, app: web.Application) -> None:
        """Serves `app` below `prefix`."""
        self._server.app.add_subapp(prefix, app)

    def observer(self, on_message: OnMessage) -> Observer:
        """Reads messages of another ComfyUI, and hands them on as `observe` does."""
        return Observer(on_message)

    @staticmethod
    def complaints(node_errors: dict[str, Any], error: dict[str, Any] | None) -> list[Complaint]:
        """What another ComfyUI finds wrong; see `complaints_in`."""
        return complaints_in(node_errors, error)

    @property
    def device_name(self) -> str:
        """What the host computes on, in its own words."""
        management = comfy.model_management
        return management.get_torch_device_name(management.get_torch_device())

    def program(self) -> tuple[str, list[str]]:
        """Path of the host's main program, and the arguments that this process was started with."""
        return str(Path(execution.__file__).with_name("main.py")), sys.argv[1:]

    def observe(self, on_message: OnMessage) -> None:
        """Lets `on_message(type, data)` be called for each message to our client id or to all."""
        self._server.sockets[OBSERVER] = Observer(on_message)
        features = {"feature_flags": {"supports_preview_metadata": True}}
        self._server.sockets_metadata[OBSERVER] = features

    async def check(self, prompt_id: str, graph: Graph) -> tuple[list[str], list[Complaint]]:
        """The outputs to run of a graph, and the host's complaints; with a complaint nothing may run."""
        good, error, outputs, node_errors = await execution.validate_prompt(prompt_id, graph, None)
        name_inputs(node_errors)
        return outputs, complaints_in(node_errors, None if good else error)

    def put(
        self,
        prompt_id: str,
        graph: Graph,
        outputs: list[str],
        created_at: float,
        owner: str = "",
        stations: Sequence[str] = (),
        tries: int = 0,
    ) -> None:
        """Queues a checked graph.

        Args:
            outputs: of `check`.
            created_at: in seconds since 1970.
            owner, stations, tries: for a fleet; see `server.fleet`.
        """
        number = self._server.number
        self._server.number += 1
        extra = {"client_id": OBSERVER, "create_time": int(created_at * 1000)}
        self._queue.put((number, prompt_id, graph, extra, outputs, {}))

    def cancel(self, prompt_id: str) -> Literal["removed", "interrupted", "absent"]:
        """Takes a job off the queue, or interrupts it; which of them it was."""
        if self._queue.delete_queue_item(lambda item: item[1] == prompt_id):
            return "removed"
        return "interrupted" if self._queue.interrupt_if_running(prompt_id) else "absent"

    def stop_running(self, seconds: float) -> None:
        """Empties the queue, interrupts what runs and waits for its end. Blocking, for the process's end.

        A thread that computes while Python ends aborts the process.
        """
        self._queue.wipe_queue()
        end = time.monotonic() + seconds
        while self._queue.currently_running and time.monotonic() < end:
            comfy.model_management.interrupt_current_processing()  # again: a job that begins forgets it
            time.sleep(0.02)

    def known(self) -> set[str]:
        """The ids of all jobs that wait or run."""
        running, queued = self._queue.get_current_queue_volatile()
        return {item[1] for item in (*running, *queued)}

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """{"outputs", "status": {"status_str", "messages"}} of a finished job, None for another."""
        return self._queue.get_history(prompt_id).get(prompt_id)

    def forget(self, prompt_id: str) -> None:
        """Removes a job from the host's history."""
        self._queue.delete_history_item(prompt_id)

    def node_inputs(self, node_class: str) -> dict[str, dict[str, Any]] | None:
        """{input name: {"type", "options", "default", "min", "max", ...}}, None for an unknown class."""
        node = NODE_CLASS_MAPPINGS.get(node_class)
        if node is None:
            return None
        return describe_inputs(node.INPUT_TYPES())

    def model_path(self, folder: str, name: str) -> Path:
        """The path of a listed model file."""
        return Path(folder_paths.get_full_path_or_raise(folder, name))

    @property
    def weight_formats(self) -> frozenset[str]:
        """The quantised formats that the host's layers read."""
        quant = comfy.quant_ops
        return frozenset(quant.QUANT_ALGOS if quant._CK_AVAILABLE else ())

    @property
    def data_directory(self) -> Path:
        """A folder for our own data, which the host does not serve."""
        return Path(folder_paths.get_system_user_directory("wan21_jobs"))

    @property
    def input_directory(self) -> Path:
        """The folder of files for LoadImage."""
        return Path(folder_paths.get_input_directory())

    @property
    def output_directory(self) -> Path:
        """The folder of files that nodes write."""
        return Path(folder_paths.get_output_directory())


def complaints_in(node_errors: dict[str, Any], error: dict[str, Any] | None) -> list[Complaint]:
    """What the host finds wrong.

    Args:
        node_errors: by node, as the host tells them.
        error: on the graph as a whole, told where no node has any.
    """
    complaints = [
        Complaint(node_id, (problem.get("extra_info") or {}).get("input_name", ""), _sentence(problem))
        for node_id, found in node_errors.items()
        for problem in found["errors"]
    ]
    return complaints or ([Complaint("", "", _sentence(error))] if error else [])


def _sentence(problem: dict[str, Any]) -> str:
    message, details = problem["message"], problem.get("details") or ""
    if message == REFUSED:
        return details
    if problem.get("type") == "custom_validation_failed" and " - " in details:
        return details.partition(" - ")[2]  # "input - complaint", from a node that checks its own inputs
    return f"{message.removesuffix('.')}: {details}" if details else message
