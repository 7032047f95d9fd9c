"""The host's queue, node registry and folders: the only file of the API that touches them."""

import json
import logging
import secrets
import struct
from pathlib import Path

import execution
import folder_paths

import nodes
from server import PromptServer

# Our client id at the host: progress of our jobs comes to us alone. Not to be guessed, because a websocket
# that gives the same id takes our place.
OBSERVER = f"wan21-jobs-{secrets.token_hex(16)}"
PREVIEW_WITH_METADATA = 4  # the host's type of a binary message
_WORD = struct.Struct(">I")


class _Observer:
    """Stands among the host's websockets and hands its messages to a function.

    Errors are logged here: in the host's publishing loop they would end it for everybody.
    """

    def __init__(self, on_message):
        self._on_message = on_message

    async def send_json(self, message):
        self._hand_on(message["type"], message["data"])

    async def send_bytes(self, message):
        try:
            preview = read_preview(bytes(message))
        except (struct.error, ValueError, KeyError):
            return  # of another pack
        if preview is not None:
            self._hand_on("preview", preview)

    def _hand_on(self, kind, data):
        if not isinstance(data, dict):
            return  # other packs broadcast what they like
        try:
            self._on_message(kind, data)
        except Exception:
            logging.exception("Wan2.1 jobs: message %s of the host was not understood", kind)


def read_preview(message):
    """Return {"prompt_id", "image": bytes} of a preview message, None for other binary messages."""
    if _WORD.unpack_from(message)[0] != PREVIEW_WITH_METADATA:
        return None
    length = _WORD.unpack_from(message, _WORD.size)[0]
    start = 2 * _WORD.size + length
    metadata = json.loads(message[2 * _WORD.size : start])
    return {"prompt_id": metadata["prompt_id"], "image": message[start:], "type": metadata["image_type"]}


class Host:
    """This process's ComfyUI. Methods are for its event loop."""

    def __init__(self):
        self._server = PromptServer.instance
        self._queue = self._server.prompt_queue

    def mount(self, prefix, app):
        """Serve `app` below `prefix`."""
        self._server.app.add_subapp(prefix, app)

    def observe(self, on_message):
        """Call `on_message(type, data)` for each message to our client id or to all."""
        self._server.sockets[OBSERVER] = _Observer(on_message)
        features = {"feature_flags": {"supports_preview_metadata": True}}
        self._server.sockets_metadata[OBSERVER] = features

    async def check(self, prompt_id, graph):
        """Let the host check an API graph.

        Returns:
            (outputs to run, [(node id, input name or "", message), ...]); with problems nothing may run.
        """
        good, error, outputs, node_errors = await execution.validate_prompt(prompt_id, graph, None)
        problems = [
            (node_id, (problem.get("extra_info") or {}).get("input_name", ""), _sentence(problem))
            for node_id, found in node_errors.items()
            for problem in found["errors"]
        ]
        if not good and not problems:
            problems = [("", "", f"{error['message']}: {error['details']}")]
        return outputs, problems

    def put(self, prompt_id, graph, outputs, created_at):
        """Queue a checked graph."""
        number = self._server.number
        self._server.number += 1
        extra = {"client_id": OBSERVER, "create_time": int(created_at * 1000)}
        self._queue.put((number, prompt_id, graph, extra, outputs, {}))

    def cancel(self, prompt_id):
        """Take a job off the queue, or interrupt it. Returns "removed", "interrupted" or "absent"."""
        if self._queue.delete_queue_item(lambda item: item[1] == prompt_id):
            return "removed"
        return "interrupted" if self._queue.interrupt_if_running(prompt_id) else "absent"

    def known(self):
        """Return the ids of all jobs that wait or run."""
        running, queued = self._queue.get_current_queue_volatile()
        return {item[1] for item in (*running, *queued)}

    def history(self, prompt_id):
        """Return {"outputs", "status": {"status_str", "messages"}} of a finished job, None without one."""
        return self._queue.get_history(prompt_id).get(prompt_id)

    def forget(self, prompt_id):
        """Remove a job from the host's history."""
        self._queue.delete_history_item(prompt_id)

    def node_inputs(self, node_class):
        """Return {input name: {"type", "options", "default", "min", "max", ...}}, None without the node."""
        node = nodes.NODE_CLASS_MAPPINGS.get(node_class)
        if node is None:
            return None
        groups = node.INPUT_TYPES()
        return {
            name: _described(spec)
            for group in ("required", "optional")
            for name, spec in groups.get(group, {}).items()
        }

    def model_path(self, folder, name):
        """Return the path of a listed model file."""
        return Path(folder_paths.get_full_path_or_raise(folder, name))

    @property
    def data_directory(self):
        """Folder for our own data, which the host does not serve."""
        return Path(folder_paths.get_system_user_directory("wan21_jobs"))

    @property
    def input_directory(self):
        return Path(folder_paths.get_input_directory())

    @property
    def output_directory(self):
        return Path(folder_paths.get_output_directory())


def _sentence(problem):
    message, details = problem["message"], problem.get("details") or ""
    _, own, complaint = details.partition(
        " - "
    )  # "input - complaint", from a node that checks its own inputs
    if own and problem.get("type") == "custom_validation_failed":
        return complaint
    return f"{message}: {details}" if details else message


def _described(spec):
    kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
    if isinstance(kind, list | tuple):  # the host's older way to write a choice
        options["options"] = list(kind)
        kind = "COMBO"
    return options | {"type": kind}
