"""Talk to a running ComfyUI over its HTTP and websocket API, in plain blocking calls.

Problems come back as sentences: `GraphRejected` when the host refuses a graph, `JobFailed` when a
node raises, `JobInterrupted` when somebody cancels.
"""

import asyncio
import contextlib
import copy
import json
import mimetypes
import queue
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from dataclasses import dataclass, field
from pathlib import Path

REQUEST_TIMEOUT_S = 60
BINARY_PREVIEW_HEADER_BYTES = 8  # event type and image type, four bytes each
BINARY_TEXT = 3  # event type; then the length of the node's id, in four bytes, the id, and the text


class GraphRejected(Exception):
    """The host refused a graph before running it; the message lists the nodes and reasons."""


class JobFailed(Exception):
    """A node raised while the graph ran. `job` holds what there was until then."""

    def __init__(self, message, job):
        super().__init__(message)
        self.job = job


class JobInterrupted(JobFailed):
    """The job was cancelled."""


@dataclass
class Job:
    """One run of a graph.

    Attributes:
        prompt_id: the host's name for this job.
        outputs: what the host's history holds: node id -> {"images": [...], "text": [...], ...}.
        events: every message of this job as (type, data), in order of arrival.
        previews: the preview images sent meanwhile, each as the bytes of a JPEG or PNG.
        texts: what nodes said meanwhile, as (node id, text).
    """

    prompt_id: str
    outputs: dict = field(default_factory=dict)
    events: list = field(default_factory=list)
    previews: list = field(default_factory=list)
    texts: list = field(default_factory=list)

    def add(self, kind, data):
        """Record one message of the host."""
        if kind == "preview":
            self.previews.append(data)
        elif kind == "text":
            self.texts.append(data)
        else:
            self.events.append((kind, data))

    @property
    def files(self):
        """Every file the job wrote, as {"filename", "subfolder", "type"}."""
        return [
            item
            for output in self.outputs.values()
            for items in output.values()
            for item in items
            if isinstance(item, dict) and "filename" in item
        ]


def fill(graph, title_or_class, **inputs):
    """Return a copy of an API graph with inputs of one node replaced.

    Args:
        graph: node id -> {"class_type", "inputs", "_meta": {"title"}}.
        title_or_class: the node's title, or else its class; exactly one node must match.
        **inputs: new values. Names the node does not have yet are added.
    """
    filled = copy.deepcopy(graph)
    filled[find_node(graph, title_or_class)]["inputs"].update(inputs)
    return filled


def find_node(graph, title_or_class):
    """Return the id of the one node of an API graph with this title, or else of this class."""
    titled = [i for i, node in graph.items() if node.get("_meta", {}).get("title") == title_or_class]
    matches = titled or [i for i, node in graph.items() if node["class_type"] == title_or_class]
    if len(matches) != 1:
        known = sorted({node.get("_meta", {}).get("title") or node["class_type"] for node in graph.values()})
        raise ValueError(
            f"{len(matches)} nodes of the graph are called {title_or_class!r}, and exactly one must be. "
            f"Use one of: {', '.join(known)}."
        )
    return matches[0]


def without(graph, *classes):
    """Return a copy of an API graph without the nodes of these classes and the inputs linked to them."""
    kept = {i: copy.deepcopy(node) for i, node in graph.items() if node["class_type"] not in classes}
    gone = graph.keys() - kept.keys()
    for node in kept.values():
        node["inputs"] = {
            name: value
            for name, value in node["inputs"].items()
            if not (isinstance(value, list) and value[0] in gone)
        }
    return kept


class ComfyClient:
    """A client for the server at `url`. A job's progress arrives where it is run only."""

    def __init__(self, url):
        self.url = url

    def get(self, path):
        """GET `path` and return the JSON in the answer."""
        return json.loads(self._request(path))

    def post(self, path, data):
        """POST `data` as JSON to `path` and return the JSON in the answer, None if it is empty."""
        answer = self._request(path, json.dumps(data).encode(), {"Content-Type": "application/json"})
        return json.loads(answer) if answer else None

    def object_info(self, node_id=None):
        """Return the host's description of one node, or of all by id."""
        return self.get(f"/object_info/{node_id}")[node_id] if node_id else self.get("/object_info")

    def upload_image(self, image, name=None):
        """Upload an image file, or its bytes, to the input folder. Returns the name for LoadImage."""
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        name = name or ("image.png" if isinstance(image, bytes) else Path(image).name)
        body, content_type = _multipart(name, data, {"overwrite": "true"})
        return json.loads(self._request("/upload/image", body, {"Content-Type": content_type}))["name"]

    def queue(self, graph, client_id=None):
        """Queue an API graph and return its prompt id; `GraphRejected` says what the host refuses.

        The host would run a graph in part when only some of its outputs are in order; here any
        problem refuses the whole graph.

        Args:
            graph: the graph in API form.
            client_id: whose websocket hears of the job; None for nobody's.
        """
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": client_id or uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise GraphRejected(_rejection(json.load(error))) from None
        if answer["node_errors"]:
            self.cancel(answer["prompt_id"])
            raise GraphRejected(_rejection(answer))
        return answer["prompt_id"]

    def run(self, graph, on_event=None, timeout_s=300):
        """Queue an API graph, follow it to its end and return the finished `Job`.

        Args:
            graph: the graph in API form.
            on_event: called with (type, data) for every message of this job, with ("preview", image
                bytes) and ("text", (node id, text)); it may call other methods, `cancel` for example.
            timeout_s: a job that takes longer is cancelled and raises `TimeoutError`.
        """
        # An id of its own: when the host notices late that the websocket of an earlier run has closed, it
        # forgets whoever has that id by then.
        client_id = uuid.uuid4().hex
        with _Events(self.url, client_id) as events:
            job = Job(self.queue(graph, client_id))
            try:
                for kind, data in events.of(job.prompt_id, timeout_s):
                    job.add(kind, data)
                    if on_event is not None:
                        on_event(kind, data)
            except TimeoutError:
                self.cancel(job.prompt_id)
                raise
        return self._finished(job)

    def history(self, prompt_id):
        """Return the host's record of a finished job, None while there is none."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def wait(self, prompt_id, timeout_s=300):
        """Wait for a queued job without following its messages; returns and raises like `run`."""
        deadline = time.monotonic() + timeout_s
        while self.history(prompt_id) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Job {prompt_id} was not finished after {timeout_s} s.")
            time.sleep(0.1)
        return self._finished(Job(prompt_id))

    def download(self, file):
        """Return the bytes of one entry of `Job.files`."""
        query = {key: file[key] for key in ("filename", "subfolder", "type")}
        return self._request(f"/view?{urllib.parse.urlencode(query)}")

    def cancel(self, prompt_id):
        """Cancel a job, whether it waits or runs. Returns whether there was something to cancel."""
        return self.post(f"/api/jobs/{prompt_id}/cancel", {})["cancelled"]

    def interrupt(self):
        """Interrupt whatever is running, as the editor's button does."""
        self.post("/interrupt", {})

    def free(self):
        """Unload all models and forget cached node results, before the next job or soon."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def _finished(self, job):
        record = self.history(job.prompt_id)
        job.outputs = record["outputs"]
        for kind, data in record["status"]["messages"]:
            if kind == "execution_error":
                name, place = data["node_type"], f"(node {data['node_id']})"
                message = data["exception_message"].strip()
                named = message.startswith(f"{name}: ")  # our own nodes put their name there themselves
                raise JobFailed(f"{message} {place}" if named else f"{name} {place}: {message}", job)
            if kind == "execution_interrupted":
                raise JobInterrupted(f"Job {job.prompt_id} was cancelled.", job)
        return job

    def _request(self, path, body=None, headers=None):
        request = urllib.request.Request(self.url + path, data=body, headers=headers or {})
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as answer:
            return answer.read()


class _Events:
    """The websocket of one client, read by a background thread into a queue."""

    def __init__(self, url, client_id):
        self.address = f"{url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        self.queue = queue.Queue()
        self.loop = asyncio.new_event_loop()

    def __enter__(self):
        threading.Thread(target=self._run, daemon=True).start()
        self._next(time.monotonic() + REQUEST_TIMEOUT_S, f"{self.address} did not greet.")
        return self

    def __exit__(self, *_):
        with contextlib.suppress(RuntimeError):  # the thread has already ended: the server is gone
            self.loop.call_soon_threadsafe(self.task.cancel)

    def of(self, prompt_id, timeout_s):
        """Yield (type, data) of one job until the host says that it has ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            kind, data = self._next(deadline, f"Job {prompt_id} was not finished after {timeout_s} s.")
            if kind not in ("preview", "text") and data.get("prompt_id") != prompt_id:
                continue
            yield kind, data
            if kind == "executing" and data["node"] is None:
                return

    def _next(self, deadline, complaint):
        try:
            item = self.queue.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise TimeoutError(complaint) from None
        if isinstance(item, Exception):
            raise ConnectionError(f"The connection to ComfyUI at {self.address} ended: {item}")
        return item

    def _run(self):
        self.task = self.loop.create_task(self._listen())
        try:
            self.loop.run_until_complete(self.task)
        except asyncio.CancelledError:
            pass
        except Exception as error:
            self.queue.put(error)
        finally:
            self.loop.close()

    async def _listen(self):
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(self.address, max_msg_size=0) as websocket,
        ):
            async for message in websocket:
                if message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    self.queue.put((event["type"], event["data"]))
                elif message.type == aiohttp.WSMsgType.BINARY:
                    self.queue.put(_binary_event(message.data))
        raise ConnectionError("the server closed it")


def _binary_event(data):
    if int.from_bytes(data[:4], "big") != BINARY_TEXT:
        return "preview", data[BINARY_PREVIEW_HEADER_BYTES:]
    end = 8 + int.from_bytes(data[4:8], "big")
    return "text", (data[8:end].decode(), data[end:].decode())


def _rejection(answer):
    """Turn the host's answer to a refused graph into one sentence per problem."""
    lines = [
        f"{problem['class_type']} (node {node_id}): {error['message']}: {_detail(error)}"
        for node_id, problem in answer["node_errors"].items()
        for error in problem["errors"]
    ]
    if not lines:
        lines = [f"{answer['error']['message']}: {answer['error']['details']}"]
    return "\n".join(dict.fromkeys(lines))  # the host repeats a node's own complaint for each input


def _detail(error):
    """What is wrong, without the input's name in front of a complaint that the node made itself."""
    _, separator, complaint = error["details"].partition(" - ")
    return complaint if separator and error["type"] == "custom_validation_failed" else error["details"]


def _multipart(name, data, fields):
    """Return (body, content type) of a form with one image file and text fields."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
    ]
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    head = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: {kind}\r\n\r\n'
    parts += [f"--{boundary}\r\n{head}".encode(), data, f"\r\n--{boundary}--\r\n".encode()]
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"
