"""From the body of a run request to a queued task."""

import asyncio
import contextlib
import secrets
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from ..net.links import check_link
from .fields import MAX_URL, NODES
from .files import Files
from .graph import (
    LOADERS,
    Graph,
    JobGraph,
    add_workers,
    build_graph,
    class_of,
    is_large,
    load_workflow,
    preferred_names,
)
from .input_model import build_input_model, read_input
from .installed import Installed
from .pictures import Pictures
from .problems import Problem, as_part, invalid, of_node, without_name
from .sessions import Sessions, check_timeout
from .settings import Settings
from .snapshot import PUBLIC_PREFIX
from .states import RECEIVED
from .store import TaskRow
from .tasks import Tasks

if TYPE_CHECKING:
    from ..host.queue import Host
    from .fleet import Fleet

APP = "infsh/wan2-1-i2v"
RETRY_SECONDS = 10
REPLY_SECONDS = 25  # the client gives up after 30 s and sends the job again
SEEDS = 2**32  # a seed is drawn below this; a client may give a larger one
MAX_METADATA = 4096  # characters
FIXED = {"run_at": None, "setup": None, "function": "run"}  # any other value is refused
PLACEMENT = ("infra", "workers")  # for a fleet; without one they are ignored: there is this machine only
PARAMS = {"app", "input", "webhook", "session", "session_timeout", "metadata", *FIXED, *PLACEMENT}


@dataclass(frozen=True)
class _Draft:
    """A job whose input and model files are checked.

    Attributes:
        identity: of the task and of the host's prompt.
        given: the input as clients see it.
        values: the checked input by field, with the seed drawn.
        workflow: the graph to fill in.
        names: model file of each part.
        notes: lines for the task's log.
    """

    identity: uuid.UUID
    given: dict[str, Any]
    values: dict[str, Any]
    workflow: Graph
    names: dict[str, str]
    notes: list[str]

    @property
    def task_id(self) -> str:
        return f"{PUBLIC_PREFIX}{self.identity.hex}"


class Jobs:
    """Takes run requests in.

    Args:
        host, fleet, settings, files, pictures, tasks, sessions, installed: the parts of the API; without a
            fleet the host runs the jobs.
    """

    def __init__(
        self,
        host: "Host",
        fleet: "Fleet | None",
        settings: Settings,
        files: Files,
        pictures: Pictures,
        tasks: Tasks,
        sessions: Sessions,
        installed: Installed,
    ):
        self._host = host
        self._fleet = fleet
        self._settings = settings
        self._files = files
        self._pictures = pictures
        self._tasks = tasks
        self._sessions = sessions
        self._installed = installed
        self._arriving: Counter[str] = Counter()
        self._model: tuple[Any, type[BaseModel]] | None = None  # and the node inputs it was made of

    def input_model(self) -> type[BaseModel]:
        """The pydantic model of the input, as the host's nodes are now."""
        inputs = {node: self._host.node_inputs(node) for node in NODES}
        if self._model is None or inputs != self._model[0]:
            self._model = inputs, build_input_model(inputs.get)
        return self._model[1]

    async def submit(self, owner: str, params: Any, base_url: str) -> TaskRow:
        """The row of a new task, whose job is checked and queued.

        Args:
            params: the JSON body: "app", "input", and optionally "webhook", "session", "metadata", ...
            base_url: address of this API as the client reached it.

        Raises:
            Problem: 404 for another app, 422 for wrong fields, 429 when too many tasks wait, 503 when the
                pictures take too long. Nothing is queued then.
        """
        _check_params(params)
        with self._place(owner):
            return await self._submit(owner, params, base_url)

    @contextlib.contextmanager
    def _place(self, owner: str) -> Iterator[None]:
        """Holds a place in the queue for a job that is being checked."""
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

    async def _submit(self, owner: str, params: dict[str, Any], base_url: str) -> TaskRow:
        began = time.monotonic()
        placement = self._fleet.placement(*(params.get(name) for name in PLACEMENT)) if self._fleet else []
        draft = await self._draft(owner, params.get("input"))
        images = await self._pictures.prepare(owner, draft.task_id, draft.values)
        try:
            _check_time(began)
            job, outputs = await self._checked_graph(draft, images, placement)
            session = await self._sessions.enter(owner, params.get("session"), params.get("session_timeout"))
            row = _task_row(owner, params, base_url, draft, job, session)
            row.placement = placement or None
            await self._files.used(owner, draft.values)
            await self._tasks.add(row, outputs, draft.notes)
        except BaseException:
            await self._pictures.discard(draft.task_id)
            raise
        return row

    async def _draft(self, owner: str, given: Any) -> _Draft:
        if isinstance(given, dict):
            given = await self._files.restore_text(owner, given)
        values = read_input(self.input_model(), given)
        workflow = load_workflow(bool(values["end_image"]))
        try:
            names, notes = await asyncio.to_thread(
                self._installed.choose,
                {part: values[part] for part in LOADERS},
                preferred_names(workflow),
                bool(values["end_image"]) and not values["add_frames_for_end_image"],
                is_large(values["size"]),
            )
        except Problem:
            if self._fleet is None or self._fleet.shelves():
                raise
            wait = {"Retry-After": str(RETRY_SECONDS)}
            raise Problem(
                503, "No station has answered yet, and which files they have.", headers=wait
            ) from None
        if values["seed"] == -1:
            values["seed"] = secrets.randbelow(SEEDS)
        return _Draft(uuid.uuid4(), given, values, workflow, names, notes)

    async def _checked_graph(
        self, draft: _Draft, images: dict[str, str], placement: Sequence[str]
    ) -> tuple[JobGraph, list[str]]:
        """The graph of a job that the host accepts, and the outputs it will run."""
        job = build_graph(
            draft.workflow,
            draft.values,
            draft.names,
            images,
            self._installed.traits(draft.names["model"]).first_last,
            f"wan21/{draft.task_id}",
            self._host.node_inputs,
        )
        if self._fleet is not None:
            add_workers(job, self._settings.gpus_per_job or 1)
        outputs, complaints = await (self._fleet or self._host).check(str(draft.identity), job.nodes)
        if self._fleet is not None:
            complaints += self._fleet.lacking(job.nodes, placement)
        if complaints:
            raise invalid(*_by_field(complaints, job))
        return job, outputs


def _task_row(
    owner: str, params: dict[str, Any], base_url: str, draft: _Draft, job: JobGraph, session: str | None
) -> TaskRow:
    now = time.time()
    return TaskRow(
        id=draft.task_id,
        owner=owner,
        prompt_id=str(draft.identity),
        status=RECEIVED,
        app=APP,
        base_url=base_url,
        input=draft.given,
        graph=job.nodes,
        roles=job.roles,
        created_at=now,
        updated_at=now,
        session_id=session,
        meta=params.get("metadata"),
        webhook=params.get("webhook"),
    )


def _check_time(began: float) -> None:
    if time.monotonic() - began > REPLY_SECONDS:
        raise Problem(
            503,
            "The pictures were not ready in time, too many jobs came at once; send the job again.",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )


def _check_params(params: Any) -> None:
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
    if metadata is not None and (not isinstance(metadata, dict) or len(str(metadata)) > MAX_METADATA):
        raise _wrong("metadata", f"must be an object of at most {MAX_METADATA} characters")
    check_timeout(params.get("session_timeout"))
    if params.get("webhook") is not None:
        _check_webhook(params["webhook"])


def _check_webhook(url: Any) -> None:
    if not isinstance(url, str) or len(url) > MAX_URL:
        raise _wrong("webhook", f"must be a link of at most {MAX_URL} characters")
    try:
        check_link(url)
    except ValueError as error:
        raise _wrong("webhook", as_part(str(error))) from error


def _wrong(path: str, message: str) -> Problem:
    return Problem(422, f"{path}: {message}", [{"path": path, "message": message}])


def _by_field(complaints: Iterable[tuple[str, str, str]], job: JobGraph) -> Iterable[tuple[str, str]]:
    """The host's complaints as (field, message), each once; a node is named where no field stands for it."""
    told: dict[tuple[str, str], None] = {}
    for node_id, name, message in complaints:
        field, node_class = job.fields.get((node_id, name), ""), class_of(job.nodes, node_id)
        text = without_name(node_class, message) if field else of_node(node_class, message)
        told[field, text] = None
    return told
