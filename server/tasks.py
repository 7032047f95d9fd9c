"""Tasks: jobs on the host's queue, with states that clients can follow and that outlive the server."""

import asyncio
import contextlib
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from . import states
from .files import KEEP_USED_SECONDS, file_row
from .graph import class_of
from .metrics import Tally
from .problems import Problem, as_part, of_node
from .progress import MAX_LOGS, STEP, JobProgress, News, Said, later
from .snapshot import iso_time, snapshot_line
from .store import FileRow, Store, TaskRow

if TYPE_CHECKING:
    from ..host.queue import Host
    from .fleet import Fleet

CHECK_SECONDS = 2  # between comparisons of the host's queue with our tasks
STOP_SECONDS = 20  # for the running job, when the process ends
SAVE_SECONDS = 5  # between writes of a running task's progress
QUEUE_LENGTH = 64  # snapshots; a reader that lags behind by more loses the oldest
MAX_ERROR, MAX_LINE = 4000, 1000  # characters; a snapshot line must stay far below 128 KiB
LOST = "the server stopped while the task ran"

Reader = asyncio.Queue[bytes | None]  # snapshot lines, then None


class Change(NamedTuple):
    """What a message changed of a task as clients see it: anything at all, its state."""

    anything: bool
    status: bool


class LiveTask:
    """A task that is not over, and its readers.

    Args:
        said: of `JobProgress`.
    """

    def __init__(self, row: TaskRow, said: Said):
        self.row = row
        self.progress = JobProgress(row.graph, row.roles, said)
        self.preview: dict[str, Any] | None = None  # {"image": bytes, "type": media type}
        self.readers: set[Reader] = set()
        self.saved_at = time.monotonic()
        self.ending = False
        self.station = ""  # of a fleet
        self.began: float | None = None  # on the monotonic clock

    def take(self, news: News) -> Change:
        """Writes news of the job into the row."""
        row = self.row
        status, progress = later(row.status, news.state), self.progress.percent
        new = [text for text in news.said if not self._has_said(text)]
        changed = Change(
            anything=bool(new) or news.line is not None or (status, progress) != (row.status, row.progress),
            status=status != row.status,
        )
        row.status, row.progress = status, progress
        if self.began is None and status not in states.NOT_STARTED:
            self.began = time.monotonic()
        if news.line is not None:
            link = f", preview {row.base_url}/tasks/{row.id}/preview" if self.preview else ""
            self.log(news.line + link)
        for text in new:
            self.log(text)
        return changed

    def begin_again(self) -> None:
        """The task waits again."""
        self.progress, self.preview = JobProgress(self.row.graph, self.row.roles, self.progress.said), None
        self.row.status, self.row.progress, self.began = states.QUEUED, 0.0, None

    def publish(self) -> None:
        """Gives the present snapshot to every reader."""
        self._put(snapshot_line(self.row))

    def release(self) -> None:
        """Tells every reader that nothing follows."""
        self._put(None)

    def _put(self, line: bytes | None) -> None:
        for reader in self.readers:
            if reader.full():
                reader.get_nowait()
            reader.put_nowait(line)

    def log(self, text: str) -> None:
        """Adds a line to the task's log; where that is full, the oldest line on a step makes room."""
        now = iso_time(time.time())
        content = _short(text)
        entry = {"id": uuid.uuid4().hex[:8], "task_id": self.row.id, "log_type": 1, "content": content}
        logs = [*self.row.logs, entry | {"created_at": now, "updated_at": now}]
        while len(logs) > MAX_LOGS:
            steps = [i for i, line in enumerate(logs) if line["content"].startswith(STEP)]
            del logs[steps[0] if len(steps) > 1 else 0]
        self.row.logs = logs

    def _has_said(self, text: str) -> bool:
        return any(entry["content"] == _short(text) for entry in self.row.logs)


class Tasks:
    """All tasks of this server.

    Attributes:
        tally: of those that ended.

    Args:
        queue: that runs their graphs: the host's, or a fleet.
        outputs: the folder that graphs write into.
        on_end: called when a task that wants a webhook has ended.
    """

    def __init__(self, store: Store, queue: "Host | Fleet", outputs: Path, on_end: Callable[[], None]):
        self._store = store
        self._queue = queue
        self._outputs = outputs
        self._on_end = on_end
        self._live: dict[str, LiveTask] = {}  # by task id
        self._by_prompt: dict[str, LiveTask] = {}  # by the host's prompt id
        self._background: set[asyncio.Task[None]] = set()
        self._said: Said = {}
        self.tally = Tally()

    async def start(self) -> None:
        """Takes up the tasks of an earlier run: waiting ones are queued again, running ones have failed."""
        unfinished = TaskRow.status.not_in(states.TERMINAL)
        for row in await self._store.select(TaskRow, unfinished, order=TaskRow.created_at):
            live = self._enter(row)
            if row.status == states.CANCELLING:
                await self._end(live, states.CANCELLED)
            elif row.status not in states.NOT_STARTED:
                await self._end(live, states.FAILED, LOST)
            else:
                await self._queue_again(live)
        self._queue.observe(self._on_message)
        self._spawn(self._watch())

    async def stop(self) -> None:
        """Ends background work."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def stop_at_exit(self) -> None:
        """Ends the running task when the process ends without its event loop, as by Ctrl+C. Blocking."""
        begun = [live for live in self._live.values() if live.row.status not in states.NOT_STARTED]
        running = [
            live.row for live in begun if not live.ending
        ]  # what ends is stored, or fails at the start
        self._queue.stop_running(STOP_SECONDS)
        for row in running:
            self._remove_outputs(row)
            cancelled = row.status == states.CANCELLING
            row.status, row.error = (states.CANCELLED, "") if cancelled else (states.FAILED, LOST)
            row.updated_at = time.time()
            if row.webhook:
                row.hook_state, row.hook_next = "pending", row.updated_at
            self._store.save_at_exit(row, "status", "error", "updated_at", "hook_state", "hook_next")

    def release(self) -> None:
        """Tells all readers that nothing follows."""
        for live in self._live.values():
            live.release()

    async def add(self, row: TaskRow, outputs: list[str], notes: Sequence[str]) -> None:
        """Stores a checked job, durably, and queues it.

        Args:
            row: the new task.
            outputs: ids of the nodes to run, of the host's check.
            notes: first lines of its log.
        """
        live = LiveTask(row, self._said)
        for note in notes:
            live.log(note)
        live.log("queued")
        row.status = states.QUEUED
        await self._store.add_task(row)
        self._enter(row, live)
        self._put(row, outputs)

    async def on_given(self, prompt_id: str, station: str) -> None:
        """Stores, durably, that a station gets a task, before it does: no task is given a third time."""
        live = self._by_prompt[prompt_id]
        row = live.row
        row.status, row.tries = later(row.status, states.DISPATCHED), row.tries + 1
        live.station, live.began = station, time.monotonic()
        live.log(f"given to station {station}")
        row.updated_at = time.time()
        live.publish()
        await self._store.save(row, "status", "tries", "logs", "updated_at")

    async def get(self, owner: str, task_id: str) -> TaskRow:
        """The row of one task of an owner.

        Raises:
            Problem: 404.
        """
        live = self._live.get(task_id)
        row = live.row if live else await self._store.get(TaskRow, task_id)
        if row is None or row.owner != owner:
            raise Problem(404, "There is no such task.")
        return row

    def unfinished(self, owner: str) -> int:
        """The number of tasks of an owner that wait or run."""
        return sum(live.row.owner == owner for live in self._live.values())

    def counts(self) -> dict[str, int]:
        """The number of tasks that wait, and of those that run."""
        waiting = sum(live.row.status in states.NOT_STARTED for live in self._live.values())
        return {"waiting": waiting, "running": len(self._live) - waiting}

    def preview(self, task_id: str) -> dict[str, Any] | None:
        """The newest preview of a task that is not over, as {"image": bytes, "type": media type}."""
        live = self._live.get(task_id)
        return live.preview if live else None

    async def cancel(self, row: TaskRow) -> None:
        """Cancels a task; one that is over stays as it is."""
        live = self._live.get(row.id)
        if live is None or live.ending:
            return
        row.status = states.CANCELLING
        if self._queue.cancel(row.prompt_id) == "removed":
            return await self._end(live, states.CANCELLED)
        await self._changed(live, save=True)

    def check_over(self, row: TaskRow) -> None:
        """Checks that a task is over.

        Raises:
            Problem: 409 while it waits or runs.
        """
        if row.id in self._live:
            raise Problem(409, "The task is not over; cancel it first.")

    async def delete(self, row: TaskRow) -> None:
        """Forgets a task that is over."""
        self._queue.forget(row.prompt_id)
        await self._store.delete(row)

    @contextlib.contextmanager
    def follow(self, task_id: str) -> Iterator[Reader | None]:
        """A context with the snapshot lines of a task as they come, or None when it is over."""
        live = self._live.get(task_id)
        if live is None:
            yield None
            return
        reader = Reader(QUEUE_LENGTH)
        live.readers.add(reader)
        try:
            yield reader
        finally:
            live.readers.discard(reader)

    # --- from the host ---------------------------------------------------------------------------------

    def _on_message(self, kind: str, data: dict[str, Any]) -> None:
        live = self._by_prompt.get(data.get("prompt_id", ""))
        if live is None or live.ending:
            return
        if kind == "preview":
            live.preview = data
        elif kind in ("requeued", "told"):  # of a fleet
            if kind == "requeued":
                live.begin_again()
            live.log(data["why"])
            self._spawn(self._changed(live, save=True))
        elif kind == "executing" and data["node"] is None:
            self._spawn(self._conclude(live))
        else:
            if kind == "execution_start" and live.row.status == states.CANCELLING:
                self._queue.cancel(live.row.prompt_id)  # an interrupt that came just before is forgotten
            change = live.take(live.progress.handle(kind, data))
            if change.anything:
                self._spawn(self._changed(live, save=change.status))

    async def _changed(self, live: LiveTask, save: bool) -> None:
        if live.ending:
            return  # `_end` publishes the last snapshot
        live.row.updated_at = time.time()
        live.publish()
        if save or time.monotonic() - live.saved_at > SAVE_SECONDS:
            live.saved_at = time.monotonic()
            await self._store.save(live.row, "status", "progress", "logs", "updated_at")

    async def _watch(self) -> None:
        """Finds tasks that ended without a message, such as those removed from the queue in the editor."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            known = self._queue.known()
            for live in list(self._live.values()):
                try:
                    if live.row.prompt_id not in known:
                        await self._conclude(live)
                    elif live.row.status == states.CANCELLING:
                        self._queue.cancel(live.row.prompt_id)
                except Exception:
                    logging.exception("Wan2.1 jobs: the end of %s could not be noted", live.row.id)

    async def _conclude(self, live: LiveTask) -> None:
        """Ends a task as the host's history says."""
        if live.ending:
            return
        record = self._queue.history(live.row.prompt_id)
        messages = dict((record or {}).get("status", {}).get("messages", []))
        if record is None:
            asked = live.row.status == states.CANCELLING
            await self._end(live, states.CANCELLED, "" if asked else "it was removed from the host's queue")
        elif "execution_interrupted" in messages:
            await self._end(live, states.CANCELLED)
        elif "execution_error" in messages:
            error = messages["execution_error"]
            message = error["exception_message"].strip() or error.get("exception_type", "")
            await self._end(live, states.FAILED, of_node(error["node_type"], message))
        else:
            await self._complete(live, record["outputs"])

    async def _complete(self, live: LiveTask, outputs: dict[str, Any]) -> None:
        row = live.row
        live.ending = True
        try:
            files, output = await asyncio.to_thread(
                self._collect, row, outputs
            )  # other calls wait for no disk
        except (KeyError, IndexError, OSError) as error:
            logging.exception("Wan2.1 jobs: the outputs of %s could not be read", row.id)
            return await self._end(live, states.FAILED, f"the outputs could not be read: {error!r}")
        except BaseException:
            live.ending = False
            raise
        await self._end(live, states.COMPLETED, files=files, output=output, progress=100.0)

    def _collect(self, row: TaskRow, outputs: dict[str, Any]) -> tuple[list[FileRow], dict[str, Any]]:
        """The files that a job wrote, and its output as clients see it."""
        folder = self._outputs
        paths = {}
        for role in ("video", "last_frame"):
            item = outputs[row.roles[role]]["images"][0]
            paths[role] = folder / item["subfolder"] / item["filename"]
        roles = ["lora_report", *(role for role in row.roles if role.startswith("report"))]
        reports = [row.roles[role] for role in roles if role in row.roles]
        report = "\n".join(outputs[node_id]["text"][0] for node_id in reports)
        paths["report"] = paths["video"].parent / "report.txt"
        paths["report"].write_text(report + "\n", encoding="utf-8", errors="backslashreplace")
        files = {role: file_row(row.owner, row.id, "output", path) for role, path in paths.items()}
        base = f"{row.base_url}/files"
        urls = {role: f"{base}/{file.id}/{file.filename}" for role, file in files.items()}
        return list(files.values()), urls | {"seed": row.graph[row.roles["sampler"]]["inputs"]["seed"]}

    async def _end(
        self,
        live: LiveTask,
        status: int,
        error: str = "",
        files: Sequence[FileRow] = (),
        **changes: Any,
    ) -> None:
        live.ending = True
        row, now = live.row, time.time()
        live.log({states.COMPLETED: "completed", states.CANCELLED: "cancelled"}.get(status, "failed"))
        changes |= {"status": status, "error": error[:MAX_ERROR], "updated_at": now, "logs": row.logs}
        if row.webhook:
            changes |= {"hook_state": "pending", "hook_next": now}
        try:
            if status != states.COMPLETED:  # before the task is over: nobody would look for them after a kill
                await asyncio.to_thread(self._remove_outputs, row)
            # Before clients are told, as that outlives a kill.
            await self._store.end_task(row, changes, files, now + KEEP_USED_SECONDS)
        except BaseException:
            live.ending = False  # `_watch` tries again
            raise
        for name, value in changes.items():
            setattr(row, name, value)
        self.tally.add(live.station, status, live.began and time.monotonic() - live.began)
        self._live.pop(row.id, None)
        self._by_prompt.pop(row.prompt_id, None)
        live.publish()
        live.release()
        if row.webhook:
            self._on_end()

    def _remove_outputs(self, row: TaskRow) -> None:
        """Removes what a task has written that is not completed, and of which no file has a row."""
        shutil.rmtree(self._outputs / "wan21" / row.id, ignore_errors=True)

    # --- help ------------------------------------------------------------------------------------------

    async def _queue_again(self, live: LiveTask) -> None:
        row = live.row
        outputs, complaints = await self._queue.check(row.prompt_id, row.graph)
        if complaints:
            told = [as_part(of_node(class_of(row.graph, node), text)) for node, _, text in complaints]
            text = "; ".join(dict.fromkeys(told))
            await self._end(live, states.FAILED, f"after a restart the host refused it: {text}")
            return
        live.log("queued again after a restart of the server")
        self._put(row, outputs)

    def _put(self, row: TaskRow, outputs: list[str]) -> None:
        order = (row.owner, row.placement or (), row.tries)
        self._queue.put(row.prompt_id, row.graph, outputs, row.created_at, *order)

    def _enter(self, row: TaskRow, live: LiveTask | None = None) -> LiveTask:
        live = live or LiveTask(row, self._said)
        self._live[row.id] = self._by_prompt[row.prompt_id] = live
        return live

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_log_failure)


def _short(text: str) -> str:
    return text if len(text) <= MAX_LINE else f"{text[: MAX_LINE - 3]}..."


def _log_failure(task: asyncio.Task[None]) -> None:
    error = None if task.cancelled() else task.exception()
    if error is not None:
        logging.error("Wan2.1 jobs: background work failed", exc_info=error)
