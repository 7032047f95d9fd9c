"""Files of clients: uploads and what becomes of them, and the room that one owner has."""

import asyncio
import base64
import contextlib
import logging
import math
import mimetypes
import re
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import StreamReader
from sqlalchemy.exc import DatabaseError

from .fields import FIELDS, MAX_SEGMENTS
from .problems import Problem, invalid
from .settings import Settings
from .store import LEAST_BYTES, FileRow, Store

URI = "wan21://files/"
IMAGE_FIELDS = ("image", "end_image")
TEXT_FIELDS = {row.name for row in FIELDS}.difference(IMAGE_FIELDS)
ARRIVING = "arriving"  # role of a picture whose task is not stored yet
KEEP_USED_SECONDS = 3600  # life of an upload after a run used it, and of a picture after its task is over
RETRY_SECONDS = 60  # where nobody knows when there is room again
MAX_FILES_PER_REQUEST = 16
MAX_TEXT_BYTES = 64 * 1024
_TOKEN = re.compile(r"[\w-]{43}")


class Removed(NamedTuple):
    """Ids of files that were removed, were gone already, and could not be removed."""

    deleted: list[str]
    skipped: list[str]
    failed: list[str]


class Files:
    """Keeps files of owners apart, and all of them below the folders it was given.

    Args:
        uploads: folder for uploads, ours alone.
    """

    def __init__(self, store: Store, settings: Settings, uploads: Path):
        self._store = store
        self._settings = settings
        self._uploads = uploads
        self._uploads.mkdir(parents=True, exist_ok=True)
        self._reserving = asyncio.Lock()  # check of the quota and its use are one step

    async def announce(
        self, owner: str, requests: Any, upload_url: Callable[[str], str]
    ) -> list[dict[str, Any]]:
        """Makes rows for files that a client is going to upload, and describes them with their URLs.

        Args:
            requests: [{"filename", "content_type", "size"}], as the client sends them.
            upload_url: from the secret part to the whole URL.

        Raises:
            Problem: 422 for a malformed request, 413 for a file that is too large, 429 when all files of
                the owner are.
        """
        if not isinstance(requests, list) or not 1 <= len(requests) <= MAX_FILES_PER_REQUEST:
            raise Problem(422, f"files must be a list of 1 to {MAX_FILES_PER_REQUEST} objects")
        rows = [self._row(owner, request) for request in requests]
        async with self._reserving:
            await self._check_room(owner, sum(max(row.size, LEAST_BYTES) for row in rows))
            await self._store.add(*rows)
        return [described(row) | {"upload_url": upload_url(row.token or "")} for row in rows]

    async def reserve(self, owner: str, row: FileRow, size: int | None = None) -> None:
        """Makes the row of a picture that is to come, or, once its size is known, counts it.

        Raises:
            Problem: 429 when the files of the owner take too much.
        """
        async with self._reserving:
            more = (
                LEAST_BYTES if size is None else max(0, size - LEAST_BYTES)
            )  # beside what its row counts as
            await self._check_room(owner, more)
            if size is None:
                await self._store.add(row)
            else:
                row.size = size
                await self._store.save(row, "size")

    async def _check_room(self, owner: str, more: int) -> None:
        now = time.time()
        taken, end = await self._store.room_taken(owner, now)
        total, limit = taken + more, self._settings.max_stored_bytes
        if total > limit:
            wait = RETRY_SECONDS if end is None else math.ceil(end - now)
            raise Problem(
                429,
                f"uploads and pictures of this key would take {total} bytes; {limit} are kept at a time. "
                "Delete the files of tasks that are over",
                headers={"Retry-After": str(max(1, wait))},
            )

    def _row(self, owner: str, request: Any) -> FileRow:
        given = request if isinstance(request, dict) else {}
        size, name, kind = (given.get(key) for key in ("size", "filename", "content_type"))
        if isinstance(size, float) and size.is_integer():
            size = int(size)  # to JSON 12.0 is an integer
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
            with contextlib.suppress(DatabaseError):  # the row expires
                await self._store.delete(row)
            raise
        row.token, row.expires_at = None, time.time() + self._settings.keep_uploads_seconds
        try:
            await self._store.save(row, "token", "expires_at")
        except DatabaseError:  # the URL is used up, and to send the file again would be no help
            logging.exception("Wan2.1 jobs: the upload %s is kept for an hour only", row.id)

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
        for name in TEXT_FIELDS & values.keys():  # others are refused: they are not worth 64 KB each
            value = values[name]
            if not isinstance(value, list):
                restored[name] = await self._text(owner, name, value)
            elif len(value) < MAX_SEGMENTS:
                restored[name] = [await self._text(owner, name, item) for item in value]
        return restored

    async def _text(self, owner: str, field: str, value: Any) -> Any:
        """A value as it was given, where it is the address of an uploaded text."""
        if not isinstance(value, str) or not value.startswith(URI):
            return value
        row = await self.upload(owner, field, value)
        if row.filename is not None or row.size > MAX_TEXT_BYTES:
            raise invalid((field, "is a file; the client uploads texts that name a file on its machine"))
        return base64.b64encode(Path(row.path).read_bytes()).decode()

    async def upload(self, owner: str, field: str, uri: str) -> FileRow:
        """The row of an uploaded file that a field of the input names.

        Raises:
            Problem: 422.
        """
        try:
            return await self.find(owner, uri.removeprefix(URI))
        except Problem:
            raise invalid((field, "the uploaded file is unknown or expired; upload it again")) from None

    async def used(self, owner: str, values: Mapping[str, Any]) -> None:
        """Lets the uploads of a job expire soon: its pictures are copied, and clients upload them anew."""
        for field in IMAGE_FIELDS:
            if (values[field] or "").startswith(URI):
                row = await self.upload(owner, field, values[field])
                if row.role != "upload" or row.expires_at is None:  # a picture of another task
                    continue
                row.expires_at = min(row.expires_at, time.time() + KEEP_USED_SECONDS)
                await self._store.save(row, "expires_at")

    async def of_task(self, task_id: str, role: str | None = None) -> Sequence[FileRow]:
        """The rows of a task's files, those of one role or all."""
        conditions = [FileRow.task_id == task_id] + ([FileRow.role == role] if role else [])
        return await self._store.select(FileRow, *conditions, order=FileRow.created_at)

    async def remove(self, rows: Iterable[FileRow]) -> Removed:
        """Removes files and their rows. One that cannot be removed keeps its row, and the rest goes."""
        removed = Removed([], [], [])
        for row in rows:
            path = Path(row.path)
            there = path.exists()
            if not _unlink(path):
                removed.failed.append(row.id)
                continue
            (removed.deleted if there else removed.skipped).append(row.id)
            await self._store.delete(row)
            if row.task_id and path.parent.name == row.task_id:
                _remove_if_empty(path.parent)
        return removed

    async def remove_stale(self) -> None:
        """Removes files whose time is up: uploads that were not finished or used, pictures of old tasks."""
        removed = await self.remove(await self._store.stale_files(time.time()))
        if removed.deleted:
            logging.info("Wan2.1 jobs: %d files removed whose time was up", len(removed.deleted))

    async def remove_left_behind(self) -> None:
        """Removes what a killed process was busy with; to be called before the first request."""
        rows = await self._store.select(FileRow, FileRow.role.in_((ARRIVING, "upload")))
        half = [row for row in rows if row.role == ARRIVING or (not row.token and not _is_there(row))]
        for row in half:
            _unlink(Path(row.path).with_suffix(".fetched"))
        await self.remove(half)
        known = {row.path for row in rows}
        for path in self._uploads.iterdir():
            if str(path) not in known:
                _unlink(path)


def _unlink(path: Path) -> bool:
    """Whether a file is gone: on Windows, somebody may play the video."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logging.warning("Wan2.1 jobs: %s cannot be removed: %s", path, error)
        return False
    return True


def _is_there(row: FileRow) -> bool:
    return Path(row.path).is_file()


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
