"""From the body of a run request to a queued task."""

import asyncio
import contextlib
import secrets
import time
import uuid
from collections import Counter

from ..net.links import check_link
from .fields import MAX_URL, NODES
from .graph import LOADERS, build_graph, class_of, load_workflow, preferred_names
from .input_model import build_input_model, read_input
from .problems import Problem, as_part, invalid, of_node, without_name
from .snapshot import PUBLIC_PREFIX
from .store import TaskRow

APP = "infsh/wan2-1-i2v"
RETRY_SECONDS = 10
REPLY_SECONDS = 25  # the client gives up after 30 and would send the job again
SEEDS = 2**32  # drawn ones; larger ones may be given
MAX_METADATA_BYTES = 4096
FIXED = {"run_at": None, "setup": None, "function": "run"}  # the only value that is served
PLACEMENT = ("infra", "workers")  # where to run: there is this machine only
PARAMS = {"app", "input", "webhook", "session", "session_timeout", "metadata", *FIXED, *PLACEMENT}


class Jobs:
    """Takes run requests in.

    Args:
        host, settings, files, tasks, sessions, installed: the parts of the API.
    """

    def __init__(self, host, settings, files, tasks, sessions, installed):
        self._host = host
        self._settings = settings
        self._files = files
        self._tasks = tasks
        self._sessions = sessions
        self._installed = installed
        self._arriving = Counter()
        self._model = (None, None)  # (inputs of the nodes, the pydantic model made of them)

    def input_model(self):
        """Return the pydantic model of the input, as the host's nodes are now."""
        inputs = {node: self._host.node_inputs(node) for node in NODES}
        if inputs != self._model[0]:
            self._model = inputs, build_input_model(inputs.get)
        return self._model[1]

    async def submit(self, owner, params, base_url):
        """Check a run request and queue its job.

        Args:
            params: the JSON body: "app", "input", and optionally "webhook", "session", "metadata", ...
            base_url: address of this API as the client reached it.

        Returns:
            The row of the new task.

        Raises:
            Problem: 404 for another app, 422 for wrong fields, 429 when too many tasks wait. Nothing is
                queued then.
        """
        _check_params(params)
        with self._place(owner):
            return await self._submit(owner, params, base_url)

    @contextlib.contextmanager
    def _place(self, owner):
        """Hold a place in the queue for a job that is being checked."""
        if self._tasks.unfinished(owner) + self._arriving[owner] >= self._settings.max_unfinished:
            raise Problem(
                429,
                f"{self._settings.max_unfinished} tasks of this key are not over; the queue takes no more.",
                headers={"Retry-After": str(RETRY_SECONDS)},
            )
        self._arriving[owner] += 1
        try:
            yield
        finally:
            self._arriving[owner] -= 1

    async def _submit(self, owner, params, base_url):
        began = time.monotonic()
        given = params.get("input")
        if isinstance(given, dict):
            given = await self._files.restore_text(owner, given)
        values = read_input(self.input_model(), given)
        workflow = load_workflow(bool(values["end_image"]))
        names, notes = await asyncio.to_thread(
            self._installed.choose,
            {part: values[part] for part in LOADERS},
            preferred_names(workflow),
            bool(values["end_image"]) and not values["add_frames_for_end_image"],
        )
        if values["seed"] == -1:
            values["seed"] = secrets.randbelow(SEEDS)
        identity = uuid.uuid4()
        task_id = f"{PUBLIC_PREFIX}{identity.hex}"
        images, rows = await self._files.prepare_images(owner, task_id, values)
        try:
            if time.monotonic() - began > REPLY_SECONDS:
                raise Problem(
                    503,
                    "The pictures were not ready in time, too many jobs came at once; send the job again.",
                    headers={"Retry-After": str(RETRY_SECONDS)},
                )
            job = build_graph(
                workflow,
                values,
                names,
                images,
                self._installed.traits(names["model"]).first_last,
                f"wan21/{task_id}",
                self._host.node_inputs,
            )
            outputs, complaints = await self._host.check(str(identity), job.nodes)
            if complaints:
                raise invalid(*_by_field(complaints, job))
            session = await self._sessions.enter(owner, params.get("session"), params.get("session_timeout"))
            now = time.time()
            row = TaskRow(
                id=task_id,
                owner=owner,
                prompt_id=str(identity),
                status=0,
                app=APP,
                base_url=base_url,
                input=given,
                graph=job.nodes,
                roles=job.roles,
                created_at=now,
                updated_at=now,
                session_id=session,
                meta=params.get("metadata"),
                webhook=params.get("webhook"),
            )
            await self._files.used(owner, values)
            await self._tasks.add(row, rows, outputs, notes)
        except BaseException:
            await self._files.remove(rows)
            raise
        return row


def _check_params(params):
    if not isinstance(params, dict) or not isinstance(params.get("app"), str):
        raise Problem(422, "the body must be an object with app and input")
    name = params["app"].partition(":")[0].partition("@")[0]
    if name != APP:
        raise Problem(404, f"There is no app {params['app'][:100]!r} here; there is {APP}.")
    for key, value in params.items():
        if key not in PARAMS:
            raise _wrong(key, "unknown field")
        if value and key in FIXED and value != FIXED[key]:
            raise _wrong(key, "not supported; leave it out")
    metadata = params.get("metadata")
    if metadata is not None and (not isinstance(metadata, dict) or len(str(metadata)) > MAX_METADATA_BYTES):
        raise _wrong("metadata", f"must be an object of at most {MAX_METADATA_BYTES} characters")
    if params.get("webhook") is not None:
        try:
            if len(params["webhook"]) > MAX_URL:
                raise ValueError(f"must be a link of at most {MAX_URL} characters")
            check_link(params["webhook"])
        except (ValueError, TypeError, AttributeError) as error:  # the last two of what is no text
            raise _wrong("webhook", as_part(str(error))) from error


def _wrong(path, message):
    return Problem(422, f"{path}: {message}", [{"path": path, "message": message}])


def _by_field(complaints, job):
    """The host's complaints as (field, message), each once; a node is named where no field stands for it."""
    told = {}
    for node_id, name, message in complaints:
        field, node_class = job.fields.get((node_id, name), ""), class_of(job.nodes, node_id)
        text = without_name(node_class, message) if field else of_node(node_class, message)
        told[field, text] = None
    return told
