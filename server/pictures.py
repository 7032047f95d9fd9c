"""Pictures of jobs, on their way into the host's input folder."""

import asyncio
import logging
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..net.fetch import fetch_bytes
from .fields import parse_size
from .files import ARRIVING, IMAGE_FIELDS, KEEP_USED_SECONDS, URI, Files
from .images import write_png
from .problems import invalid
from .settings import Settings
from .store import FileRow, Store
from .turns import Turns

FETCH_SECONDS = 12  # for each of two pictures; the client waits 30 s for the answer to a run
FETCHERS = 16
FETCHERS_PER_OWNER = 8  # below FETCHERS: slow servers of one owner do not hold up the others


class Pictures:
    """Fetches and decodes the pictures of jobs.

    A row is there before its file, so that a killed process leaves no file that nobody knows of.

    Args:
        inputs: the host's input folder.
    """

    def __init__(self, store: Store, settings: Settings, files: Files, inputs: Path):
        self._store = store
        self._settings = settings
        self._files = files
        self._inputs = inputs
        # Pools of their own: a slow server elsewhere blocks only fetches, and one picture is decoded at a
        # time because a large one takes much memory.
        self._fetchers = ThreadPoolExecutor(FETCHERS, thread_name_prefix="wan21-fetch")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan21-image")
        self._fetching = defaultdict(lambda: asyncio.Semaphore(FETCHERS_PER_OWNER))
        self._decoding = Turns()

    async def prepare(self, owner: str, task_id: str, values: Mapping[str, Any]) -> dict[str, str]:
        """Brings the pictures of a job into the host's input folder: {"image": name for LoadImage, ...}.

        Their rows are of role "arriving" until the task is stored.

        Raises:
            Problem: 422 with the field of a picture that cannot be fetched or decoded, 429 when the files of
                the owner are too many. No file stays then.
        """
        names: dict[str, str] = {}
        size = parse_size(values["size"])
        try:
            for field in IMAGE_FIELDS:
                if values[field]:
                    path = self._folder(task_id) / f"{field}.png"
                    row = _arriving(owner, task_id, path)
                    await self._files.reserve(owner, row)
                    await self._prepare(owner, field, values[field], path, size)
                    await self._files.reserve(owner, row, path.stat().st_size)
                    names[field] = path.relative_to(self._inputs).as_posix()
        except BaseException:
            await self.discard(task_id)
            raise
        return names

    async def discard(self, task_id: str) -> None:
        """Removes the pictures of a job that is not queued after all."""
        shutil.rmtree(self._folder(task_id), ignore_errors=True)
        try:
            await self._files.remove(await self._files.of_task(task_id, ARRIVING))
        except Exception:  # such as a full disk, of which the client is told already; the rows expire
            logging.exception("Wan2.1 jobs: the pictures of %s could not be removed", task_id)

    def _folder(self, task_id: str) -> Path:
        return self._inputs / "wan21" / task_id

    async def _prepare(self, owner: str, field: str, value: str, path: Path, size: tuple[int, int]) -> None:
        loop = asyncio.get_running_loop()
        fetched = path.with_suffix(".fetched")  # on disk, because many may wait for the decoder
        try:
            if value.startswith(URI):
                source = Path((await self._files.upload(owner, field, value)).path)
            elif value.startswith(("https://", "http://")):
                limit, source = self._settings.max_upload_bytes, fetched
                async with self._fetching[owner]:
                    await loop.run_in_executor(self._fetchers, _fetch, value, limit, fetched)
            else:
                raise invalid((field, "must be an uploaded file or an https URL"))
            async with self._decoding.turn(owner):
                await loop.run_in_executor(self._decoder, write_png, source, path, size)
        except ValueError as error:
            raise invalid((field, str(error))) from error
        finally:
            fetched.unlink(missing_ok=True)


def _arriving(owner: str, task_id: str, path: Path) -> FileRow:
    now = time.time()
    return FileRow(
        id=secrets.token_hex(16),
        owner=owner,
        role=ARRIVING,
        filename=path.name,
        content_type="image/png",
        size=0,
        path=str(path),
        created_at=now,
        task_id=task_id,
        expires_at=now + KEEP_USED_SECONDS,
    )


def _fetch(url: str, limit: int, path: Path) -> None:
    content = fetch_bytes(url, limit, FETCH_SECONDS)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
