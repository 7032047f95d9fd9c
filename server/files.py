"""Files of clients: uploads, the pictures of jobs, and what jobs wrote."""

import asyncio
import base64
import logging
import math
import mimetypes
import re
import secrets
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..net.fetch import fetch_bytes
from .images import write_png
from .problems import Problem, invalid
from .store import FileRow

URI = "wan21://files/"
IMAGE_FIELDS = ("image", "end_image")
FETCH_SECONDS = 12  # each of two; the client waits 30 s for the answer to a run
KEEP_USED_SECONDS = 3600
MAX_FILES_PER_REQUEST = 16
MAX_TEXT_BYTES = 64 * 1024
_TOKEN = re.compile(r"[\w-]{43}")


class Files:
    """Keeps files of owners apart, and all of them below the folders it was given.

    Args:
        store: `Store`.
        settings: `Settings`.
        uploads: folder for uploads, ours alone.
        inputs: the host's input folder, where the pictures of jobs go.
    """

    def __init__(self, store, settings, uploads, inputs):
        self._store = store
        self._settings = settings
        self._uploads = Path(uploads)
        self._inputs = Path(inputs)
        self._uploads.mkdir(parents=True, exist_ok=True)
        # Threads of their own: slow servers elsewhere hold up nothing else, and one picture at a time is
        # decoded, because a large one takes much memory.
        self._fetchers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="wan21-fetch")
        self._announcing = asyncio.Lock()  # between the look at the quota and the taking of it
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan21-image")

    async def announce(self, owner, requests, upload_url):
        """Make rows for files that a client is going to upload.

        Args:
            requests: [{"filename", "content_type", "size"}], as the client sends them.
            upload_url: function from the secret part to the whole URL.

        Raises:
            Problem: 422 for a malformed request, 413 for a file that is too large, 429 when all uploads are.
        """
        if not isinstance(requests, list) or not 1 <= len(requests) <= MAX_FILES_PER_REQUEST:
            raise Problem(422, f"files must be a list of 1 to {MAX_FILES_PER_REQUEST} objects")
        rows = [self._row(owner, request) for request in requests]
        async with self._announcing:
            now = time.time()
            kept = await self._store.kept_uploads(owner, now)
            total, limit = sum(row.size for row in (*kept, *rows)), self._settings.max_stored_bytes
            if total > limit:
                wait = math.ceil(min((row.expires_at for row in kept), default=now) - now)
                raise Problem(
                    429,
                    f"uploads of this key would take {total} bytes; {limit} are kept at a time",
                    headers={"Retry-After": str(max(1, wait))},
                )
            await self._store.add(*rows)
        return [described(row) | {"upload_url": upload_url(row.token)} for row in rows]

    def _row(self, owner, request):
        size = request.get("size") if isinstance(request, dict) else None
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise Problem(422, "each file needs its size in bytes")
        if size > self._settings.max_upload_bytes:
            raise Problem(413, f"the file has {size} bytes; the most are {self._settings.max_upload_bytes}")
        name, kind = request.get("filename"), request.get("content_type")
        file_id, now = secrets.token_hex(16), time.time()
        return FileRow(
            id=file_id,
            owner=owner,
            role="upload",
            filename=name[:255] if isinstance(name, str) else None,
            content_type=kind[:255] if isinstance(kind, str) else "application/octet-stream",
            size=size,
            path=str(self._uploads / file_id),
            created_at=now,
            token=secrets.token_urlsafe(32),
            expires_at=now + self._settings.upload_seconds,
        )

    async def receive(self, token, content):
        """Store the bytes of one announced upload; its URL works once.

        Args:
            token: secret part of the URL.
            content: stream with `iter_chunked`.

        Raises:
            Problem: 404 for an unknown, used or expired URL; 413 or 400 when the size is not the announced.
        """
        row = _TOKEN.fullmatch(token) and await self._store.claim_upload(token, time.time())
        if not row:
            raise Problem(404, "This upload URL is unknown, used or expired.")
        path, received = Path(row.path), 0
        part = path.with_suffix(".part")
        try:
            with open(part, "wb") as file:
                async for chunk in content.iter_chunked(2**18):
                    received += len(chunk)
                    if received > row.size:
                        raise Problem(413, f"more than the announced {row.size} bytes were sent")
                    await asyncio.to_thread(file.write, chunk)
            if received != row.size:
                raise Problem(400, f"{received} of the announced {row.size} bytes were sent")
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            await self._store.delete(row)
            raise
        row.token, row.expires_at = None, time.time() + self._settings.keep_uploads_seconds
        await self._store.save(row, "token", "expires_at")

    async def find(self, owner, file_id):
        """Return the row of one complete file of an owner.

        Raises:
            Problem: 404.
        """
        row = await self._store.get(FileRow, file_id)
        if row is None or row.owner != owner or not Path(row.path).is_file():
            raise Problem(404, "There is no such file.")
        return row

    async def restore_text(self, owner, values):
        """Undo what the client does to texts that look like base64: it uploads them and sends a URI.

        Raises:
            Problem: 422 when the text was the name of a real file.
        """
        restored = dict(values)
        for name, value in values.items():
            if name in IMAGE_FIELDS or not isinstance(value, str) or not value.startswith(URI):
                continue
            row = await self._upload(owner, name, value)
            if row.filename is not None or row.size > MAX_TEXT_BYTES:
                raise invalid((name, "is a file; the client uploads texts that name a file on its machine"))
            restored[name] = base64.b64encode(Path(row.path).read_bytes()).decode()
        return restored

    async def _upload(self, owner, field, uri):
        try:
            return await self.find(owner, uri.removeprefix(URI))
        except Problem:
            raise invalid((field, "the uploaded file is unknown or expired; upload it again")) from None

    async def prepare_images(self, owner, task_id, values):
        """Bring the pictures of a job into the host's input folder.

        Returns:
            ({"image": name for LoadImage, ...}, rows to add)

        Raises:
            Problem: 422 with the field of a picture that cannot be had or decoded. Nothing is left then.
        """
        names, rows = {}, []
        folder = self._inputs / "wan21" / task_id
        try:
            for field in IMAGE_FIELDS:
                if values[field]:
                    path = folder / f"{field}.png"
                    await self._prepare(owner, field, values[field], path)
                    names[field] = path.relative_to(self._inputs).as_posix()
                    rows.append(file_row(owner, task_id, "input", path))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return names, rows

    async def _prepare(self, owner, field, value, path):
        loop = asyncio.get_running_loop()
        fetched = path.with_suffix(".fetched")  # on disk: many may wait for the decoder
        try:
            if value.startswith(URI):
                source = Path((await self._upload(owner, field, value)).path)
            elif value.startswith(("https://", "http://")):
                limit, source = self._settings.max_upload_bytes, fetched
                await loop.run_in_executor(self._fetchers, _fetch, value, limit, fetched)
            else:
                raise invalid((field, "must be an uploaded file or an https URL"))
            await loop.run_in_executor(self._decoder, write_png, source, path)
        except ValueError as error:
            raise invalid((field, str(error))) from error
        finally:
            fetched.unlink(missing_ok=True)

    async def used(self, owner, values):
        """Let the uploads of a job go soon: its pictures are copied, and clients upload anew each time."""
        for field in IMAGE_FIELDS:
            if (values[field] or "").startswith(URI):
                row = await self._upload(owner, field, values[field])
                if row.role != "upload":  # a picture of another task, kept as long as that
                    continue
                row.expires_at = min(row.expires_at, time.time() + KEEP_USED_SECONDS)
                await self._store.save(row, "expires_at")

    async def of_task(self, task_id, role=None):
        """Return the rows of a task's files."""
        conditions = [FileRow.task_id == task_id] + ([FileRow.role == role] if role else [])
        return await self._store.select(FileRow, *conditions, order=FileRow.created_at)

    async def remove(self, rows):
        """Remove files and their rows. Returns (ids removed, ids of files that were gone already)."""
        deleted, skipped = [], []
        for row in rows:
            path = Path(row.path)
            (deleted if path.is_file() else skipped).append(row.id)
            path.unlink(missing_ok=True)
            await self._store.delete(row)
            if row.task_id and path.parent.name == row.task_id:
                _remove_if_empty(path.parent)
        return deleted, skipped

    async def remove_stale(self):
        """Remove uploads that were not finished or not used in time, and parts without a row."""
        deleted, _ = await self.remove(await self._store.stale_files(time.time()))
        if deleted:
            logging.info("Wan2.1 jobs: %d unused uploads removed", len(deleted))
        oldest = time.time() - self._settings.keep_uploads_seconds
        for path in self._uploads.glob("*.part"):  # of a killed process
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def _fetch(url, limit, path):
    content = fetch_bytes(url, limit, FETCH_SECONDS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def file_row(owner, task_id, role, path):
    """Return the row of a file that lies at `path`."""
    return FileRow(
        id=secrets.token_hex(16),
        owner=owner,
        role=role,
        filename=path.name,
        content_type=mimetypes.guess_type(path.name)[0] or "application/octet-stream",
        size=path.stat().st_size,
        path=str(path),
        created_at=time.time(),
        task_id=task_id,
    )


def described(row):
    """Return what a client is told about a file."""
    return {
        "id": row.id,
        "uri": URI + row.id,
        "filename": row.filename,
        "content_type": row.content_type,
        "size": row.size,
        "role": row.role,
        "task_id": row.task_id,
    }


def _remove_if_empty(folder):
    try:
        folder.rmdir()
    except OSError:
        return  # something else is still in it
