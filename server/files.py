"""Files of clients: uploads, the pictures of jobs, and what jobs wrote."""

import asyncio
import base64
import contextlib
import logging
import math
import mimetypes
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from aiohttp import StreamReader

from ..net.fetch import fetch_bytes
from .images import write_png
from .problems import Problem, invalid
from .settings import Settings
from .store import FileRow, Store

URI = "wan21://files/"
IMAGE_FIELDS = ("image", "end_image")
FETCH_SECONDS = 12  # for each of two pictures; the client waits 30 s for the answer to a run
KEEP_USED_SECONDS = 3600  # life of an upload after a run used it
MAX_FILES_PER_REQUEST = 16
MAX_TEXT_BYTES = 64 * 1024
_TOKEN = re.compile(r"[\w-]{43}")


class Files:
    """Keeps files of owners apart, and all of them below the folders it was given.

    Args:
        uploads: folder for uploads, ours alone.
        inputs: the host's input folder, where the pictures of jobs go.
    """

    def __init__(self, store: Store, settings: Settings, uploads: Path, inputs: Path):
        self._store = store
        self._settings = settings
        self._uploads = uploads
        self._inputs = inputs
        self._uploads.mkdir(parents=True, exist_ok=True)
        # Pools of their own: a slow server elsewhere blocks only fetches, and one picture is decoded at a
        # time because a large one takes much memory.
        self._fetchers = ThreadPoolExecutor(max_workers=16, thread_name_prefix="wan21-fetch")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan21-image")
        self._announcing = asyncio.Lock()  # check of the quota and its use are one step

    async def announce(
        self, owner: str, requests: Any, upload_url: Callable[[str], str]
    ) -> list[dict[str, Any]]:
        """Makes rows for files that a client is going to upload, and describes them with their URLs.

        Args:
            requests: [{"filename", "content_type", "size"}], as the client sends them.
            upload_url: from the secret part to the whole URL.

        Raises:
            Problem: 422 for a malformed request, 413 for a file that is too large, 429 when all uploads of
                the owner are.
        """
        if not isinstance(requests, list) or not 1 <= len(requests) <= MAX_FILES_PER_REQUEST:
            raise Problem(422, f"files must be a list of 1 to {MAX_FILES_PER_REQUEST} objects")
        rows = [self._row(owner, request) for request in requests]
        async with self._announcing:
            now = time.time()
            kept = await self._store.kept_uploads(owner, now)
            total, limit = sum(row.size for row in (*kept, *rows)), self._settings.max_stored_bytes
            if total > limit:
                wait = math.ceil(min((row.expires_at or now for row in kept), default=now) - now)
                raise Problem(
                    429,
                    f"uploads of this key would take {total} bytes; {limit} are kept at a time",
                    headers={"Retry-After": str(max(1, wait))},
                )
            await self._store.add(*rows)
        return [described(row) | {"upload_url": upload_url(row.token or "")} for row in rows]

    def _row(self, owner: str, request: Any) -> FileRow:
        given = request if isinstance(request, dict) else {}
        size, name, kind = (given.get(key) for key in ("size", "filename", "content_type"))
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise Problem(422, "each file needs its size in bytes")
        if size > self._settings.max_upload_bytes:
            raise Problem(413, f"the file has {size} bytes; the most are {self._settings.max_upload_bytes}")
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

    async def receive(self, token: str, content: StreamReader) -> None:
        """Stores the bytes of one announced upload; its URL works once.

        Args:
            token: secret part of the URL.
            content: body of the request.

        Raises:
            Problem: 404 for an unknown, used or expired URL; 413 or 400 when the size is not the announced.
        """
        row = await self._store.claim_upload(token, time.time()) if _TOKEN.fullmatch(token) else None
        if row is None:
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

    async def find(self, owner: str, file_id: str) -> FileRow:
        """The row of one complete file of an owner.

        Raises:
            Problem: 404.
        """
        row = await self._store.get(FileRow, file_id)
        if row is None or row.owner != owner or not Path(row.path).is_file():
            raise Problem(404, "There is no such file.")
        return row

    async def restore_text(self, owner: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """The input with its texts as they were given: the client uploads a text that looks like base64.

        Raises:
            Problem: 422 when the text was the name of a file on the client's machine, which it uploads too.
        """
        restored = dict(values)
        for name, value in values.items():
            if isinstance(value, list):
                restored[name] = [await self._text(owner, name, item) for item in value]
            elif name not in IMAGE_FIELDS:
                restored[name] = await self._text(owner, name, value)
        return restored

    async def _text(self, owner: str, field: str, value: Any) -> Any:
        """A value as it was given, where it is the address of an uploaded text."""
        if not isinstance(value, str) or not value.startswith(URI):
            return value
        row = await self._upload(owner, field, value)
        if row.filename is not None or row.size > MAX_TEXT_BYTES:
            raise invalid((field, "is a file; the client uploads texts that name a file on its machine"))
        return base64.b64encode(Path(row.path).read_bytes()).decode()

    async def _upload(self, owner: str, field: str, uri: str) -> FileRow:
        try:
            return await self.find(owner, uri.removeprefix(URI))
        except Problem:
            raise invalid((field, "the uploaded file is unknown or expired; upload it again")) from None

    async def prepare_images(
        self, owner: str, task_id: str, values: Mapping[str, Any]
    ) -> tuple[dict[str, str], list[FileRow]]:
        """Brings the pictures of a job into the host's input folder.

        Returns:
            ({"image": name for LoadImage, ...}, rows to add).

        Raises:
            Problem: 422 with the field of a picture that cannot be fetched or decoded. No file stays then.
        """
        names: dict[str, str] = {}
        rows: list[FileRow] = []
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

    async def _prepare(self, owner: str, field: str, value: str, path: Path) -> None:
        loop = asyncio.get_running_loop()
        fetched = path.with_suffix(".fetched")  # on disk, because many may wait for the decoder
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

    async def used(self, owner: str, values: Mapping[str, Any]) -> None:
        """Lets the uploads of a job expire soon: its pictures are copied, and clients upload them anew."""
        for field in IMAGE_FIELDS:
            if (values[field] or "").startswith(URI):
                row = await self._upload(owner, field, values[field])
                if row.role != "upload" or row.expires_at is None:  # a picture of another task
                    continue
                row.expires_at = min(row.expires_at, time.time() + KEEP_USED_SECONDS)
                await self._store.save(row, "expires_at")

    async def of_task(self, task_id: str, role: str | None = None) -> Sequence[FileRow]:
        """The rows of a task's files, those of one role or all."""
        conditions = [FileRow.task_id == task_id] + ([FileRow.role == role] if role else [])
        return await self._store.select(FileRow, *conditions, order=FileRow.created_at)

    async def remove(self, rows: Iterable[FileRow]) -> tuple[list[str], list[str]]:
        """Removes files and their rows; (ids of files removed, ids of files that were gone already)."""
        deleted: list[str] = []
        skipped: list[str] = []
        for row in rows:
            path = Path(row.path)
            (deleted if path.is_file() else skipped).append(row.id)
            path.unlink(missing_ok=True)
            await self._store.delete(row)
            if row.task_id and path.parent.name == row.task_id:
                _remove_if_empty(path.parent)
        return deleted, skipped

    async def remove_stale(self) -> None:
        """Removes uploads that were not finished or not used in time, and parts of a killed process."""
        deleted, _ = await self.remove(await self._store.stale_files(time.time()))
        if deleted:
            logging.info("Wan2.1 jobs: %d unused uploads removed", len(deleted))
        oldest = time.time() - self._settings.keep_uploads_seconds
        for path in self._uploads.glob("*.part"):
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)


def _fetch(url: str, limit: int, path: Path) -> None:
    content = fetch_bytes(url, limit, FETCH_SECONDS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def file_row(owner: str, task_id: str, role: str, path: Path) -> FileRow:
    """A new row for the file at `path`."""
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


def described(row: FileRow) -> dict[str, Any]:
    """A file as clients see it."""
    return {
        "id": row.id,
        "uri": URI + row.id,
        "filename": row.filename,
        "content_type": row.content_type,
        "size": row.size,
        "role": row.role,
        "task_id": row.task_id,
    }


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # of a folder that is not empty
        folder.rmdir()
