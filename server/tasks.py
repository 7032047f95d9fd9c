"""Tasks: jobs on the host's queue, with states that clients can follow and that outlive the server."""

import asyncio
import contextlib
import logging
import time
import uuid

from . import states
from .files import file_row
from .graph import class_of
from .problems import Problem, as_part, of_node
from .progress import MAX_LOGS, JobProgress, later
from .snapshot import iso_time, snapshot_line
from .store import TaskRow

CHECK_SECONDS = 2  # how often the host's queue is compared with our tasks
SAVE_SECONDS = 5  # how often the progress of a running task is written
QUEUE_LENGTH = 64  # snapshots that a slow reader may lag behind
MAX_ERROR = 4000  # characters; a snapshot line must stay far below 128 KiB
LOST = "the server stopped while the task ran"


class LiveTask:
    """A task that is not over, and its readers."""

    def __init__(self, row):
        self.row = row
        self.progress = JobProgress(row.graph, row.roles)
        self.preview = None  # {"image": bytes, "type": media type}
        self.readers = set()
        self.saved_at = time.monotonic()
        self.ending = False

    def publish(self):
        """Give the present snapshot to every reader."""
        self._put(snapshot_line(self.row))

    def release(self):
        """Tell every reader that nothing follows."""
        self._put(None)

    def _put(self, line):
        for reader in self.readers:
            if reader.full():
                reader.get_nowait()  # one that lags loses its oldest
            reader.put_nowait(line)

    def log(self, text):
        """Add a line to the task's log."""
        now = iso_time(time.time())
        entry = {"id": uuid.uuid4().hex[:8], "task_id": self.row.id, "log_type": 1, "content": text}
        logs = [*self.row.logs, entry | {"created_at": now, "updated_at": now}]
        self.row.logs = logs[-MAX_LOGS:]


class Tasks:
    """All tasks of this server.

    Args:
        store: `Store`.
        host: `Host`.
        on_end: called with each task row that has ended and wants a webhook.
    """

    def __init__(self, store, host, on_end):
        self._store = store
        self._host = host
        self._on_end = on_end
        self._live = {}  # task id -> LiveTask
        self._by_prompt = {}  # prompt id -> LiveTask
        self._background = set()

    async def start(self):
        """Take up the tasks of an earlier run: waiting ones are queued again, running ones have failed."""
        unfinished = TaskRow.status.not_in(states.TERMINAL)
        for row in await self._store.select(TaskRow, unfinished, order=TaskRow.created_at):
            live = self._enter(row)
            if row.status == states.CANCELLING:
                await self._end(live, states.CANCELLED)
            elif row.status not in states.NOT_STARTED:
                await self._end(live, states.FAILED, LOST)
            else:
                await self._queue_again(live)
        self._host.observe(self._on_message)
        self._spawn(self._watch())

    async def stop(self):
        """End background work."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)

    def release(self):
        """Let all readers go."""
        for live in self._live.values():
            live.release()

    async def add(self, row, files, outputs, notes):
        """Store a checked job and queue it. When this returns, the task is not lost any more."""
        live = LiveTask(row)
        for note in notes:
            live.log(note)
        live.log("queued")
        row.status = states.QUEUED
        await self._store.add(row, *files)
        self._enter(row, live)
        self._host.put(row.prompt_id, row.graph, outputs, row.created_at)

    async def get(self, owner, task_id):
        """Return the row of one task of an owner.

        Raises:
            Problem: 404.
        """
        live = self._live.get(task_id)
        row = live.row if live else await self._store.get(TaskRow, task_id)
        if row is None or row.owner != owner:
            raise Problem(404, "There is no such task.")
        return row

    def unfinished(self, owner):
        """Return how many tasks of an owner wait or run."""
        return sum(live.row.owner == owner for live in self._live.values())

    def preview(self, task_id):
        """Return the newest preview of a task that is not over, None without one."""
        live = self._live.get(task_id)
        return live and live.preview

    async def cancel(self, row):
        """Cancel a task; of one that is over, nothing changes."""
        live = self._live.get(row.id)
        if live is None or live.ending:
            return
        if self._host.cancel(row.prompt_id) == "removed":
            return await self._end(live, states.CANCELLED)
        row.status = states.CANCELLING
        await self._changed(live, save=True)

    async def delete(self, row):
        """Forget a task that is over.

        Raises:
            Problem: 409 while it waits or runs.
        """
        if row.id in self._live:
            raise Problem(409, "The task is not over; cancel it first.")
        self._host.forget(row.prompt_id)
        await self._store.delete(row)

    @contextlib.contextmanager
    def follow(self, task_id):
        """Yield a queue of snapshot lines of a live task, ended by None; no queue when it is over."""
        live = self._live.get(task_id)
        if live is None:
            yield None
            return
        reader = asyncio.Queue(QUEUE_LENGTH)
        live.readers.add(reader)
        try:
            yield reader
        finally:
            live.readers.discard(reader)

    # --- from the host ---------------------------------------------------------------------------------

    def _on_message(self, kind, data):
        live = self._by_prompt.get(data.get("prompt_id"))
        if live is None or live.ending:
            return
        row = live.row
        if kind == "preview":
            live.preview = data
            return
        if kind == "executing" and data["node"] is None:
            self._spawn(self._conclude(live))
            return
        if kind == "execution_start" and row.status == states.CANCELLING:
            self._host.cancel(row.prompt_id)  # the host forgets an interrupt that came just before
        state, line = live.progress.handle(kind, data)
        before = (row.status, row.progress, len(row.logs))
        row.status = later(row.status, state)
        row.progress = live.progress.percent
        if line is not None:
            link = f", preview {row.base_url}/tasks/{row.id}/preview" if live.preview else ""
            live.log(line + link)
        if line is not None or before[:2] != (row.status, row.progress):
            self._spawn(self._changed(live, save=before[0] != row.status))

    async def _changed(self, live, save):
        if live.ending:
            return  # its last snapshot follows
        live.row.updated_at = time.time()
        live.publish()
        if save or time.monotonic() - live.saved_at > SAVE_SECONDS:
            live.saved_at = time.monotonic()
            await self._store.save(live.row, "status", "progress", "logs", "updated_at")

    async def _watch(self):
        """Find tasks whose end was not told, such as those removed from the queue in the editor."""
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            known = self._host.known()
            for live in list(self._live.values()):
                try:
                    if live.row.prompt_id not in known:
                        await self._conclude(live)
                    elif live.row.status == states.CANCELLING:
                        self._host.cancel(live.row.prompt_id)
                except Exception:
                    logging.exception("Wan2.1 jobs: the end of %s could not be noted", live.row.id)

    async def _conclude(self, live):
        """End a task as the host's history says."""
        if live.ending:
            return
        record = self._host.history(live.row.prompt_id)
        messages = dict((record or {}).get("status", {}).get("messages", []))
        if record is None:
            await self._end(live, states.CANCELLED, "it was removed from the host's queue")
        elif "execution_interrupted" in messages:
            await self._end(live, states.CANCELLED)
        elif "execution_error" in messages:
            error = messages["execution_error"]
            message = error["exception_message"].strip() or error.get("exception_type", "")
            await self._end(live, states.FAILED, of_node(error["node_type"], message))
        else:
            await self._complete(live, record["outputs"])

    async def _complete(self, live, outputs):
        row = live.row
        try:
            files, output = self._collect(row, outputs)
        except (KeyError, IndexError, OSError) as error:
            logging.exception("Wan2.1 jobs: the outputs of %s could not be read", row.id)
            return await self._end(live, states.FAILED, f"the outputs could not be read: {error!r}")
        await self._end(live, states.COMPLETED, files=files, output=output, progress=100.0)

    def _collect(self, row, outputs):
        folder = self._host.output_directory
        paths = {}
        for role in ("video", "last_frame"):
            item = outputs[row.roles[role]]["images"][0]
            paths[role] = folder / item["subfolder"] / item["filename"]
        report = outputs[row.roles["report"]]["text"][0]
        paths["report"] = paths["video"].parent / "report.txt"
        paths["report"].write_text(report + "\n", encoding="utf-8")
        files = {role: file_row(row.owner, row.id, "output", path) for role, path in paths.items()}
        base = f"{row.base_url}/files"
        urls = {role: f"{base}/{file.id}/{file.filename}" for role, file in files.items()}
        return list(files.values()), urls | {"seed": row.graph[row.roles["sampler"]]["inputs"]["seed"]}

    async def _end(self, live, status, error="", files=(), **changes):
        live.ending = True
        row, now = live.row, time.time()
        live.log({states.COMPLETED: "completed", states.CANCELLED: "cancelled"}.get(status, "failed"))
        changes |= {"status": status, "error": error[:MAX_ERROR], "updated_at": now, "logs": row.logs}
        if row.webhook:
            changes |= {"hook_state": "pending", "hook_next": now}
        try:
            await self._store.write(row, changes, *files)  # before anybody hears of it
        except BaseException:
            live.ending = False  # tried again by `_watch`
            raise
        for name, value in changes.items():
            setattr(row, name, value)
        self._live.pop(row.id, None)
        self._by_prompt.pop(row.prompt_id, None)
        live.publish()
        live.release()
        if row.webhook:
            self._on_end()

    # --- help ------------------------------------------------------------------------------------------

    async def _queue_again(self, live):
        row = live.row
        outputs, complaints = await self._host.check(row.prompt_id, row.graph)
        if complaints:
            told = [as_part(of_node(class_of(row.graph, node), text)) for node, _, text in complaints]
            text = "; ".join(dict.fromkeys(told))
            await self._end(live, states.FAILED, f"after a restart the host refused it: {text}")
            return
        live.log("queued again after a restart of the server")
        self._host.put(row.prompt_id, row.graph, outputs, row.created_at)

    def _enter(self, row, live=None):
        live = live or LiveTask(row)
        self._live[row.id] = self._by_prompt[row.prompt_id] = live
        return live

    def _spawn(self, work):
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        task.add_done_callback(_log_failure)


def _log_failure(task):
    if not task.cancelled() and task.exception() is not None:
        logging.error("Wan2.1 jobs: background work failed", exc_info=task.exception())
