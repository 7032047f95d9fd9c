"""Downloads of links that people give: bounded, resumable, checked before use.

`links` says where a link may lead, `settings` whether anything is downloaded and how large a file may be.
"""

import contextlib
import hashlib
import http.client
import json
import os
import re
import shutil
import tempfile
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..wan.refusal import Refusal
from .links import check_link, open_link, shown
from .settings import downloads_allowed, max_download_bytes

HEADERS = {"User-Agent": "wan21-i2v"}
PIECE_BYTES = 1 << 20
FETCH_SECONDS = 6 * 3600  # limit of one call of `fetch`; the next call resumes
WAIT_SECONDS = 0.2  # between looks whether the user has cancelled, while another process fetches
HEAD_BYTES = 1 << 16  # given to `check_head`
MOST = 1 << 63  # bytes that a server may state: what it says has any number of digits
MAX_NAME = 120  # bytes
RAISE_LIMIT = "The server's owner may raise WAN21_MAX_DOWNLOAD_GB"
_LOCK = threading.Lock()  # one download at a time: two jobs with one link must not share a partial file

Progress = Callable[[int, int], None]


def fetch(
    url: str,
    folder: str | Path,
    suffix: str,
    check: Callable[[Path], None],
    check_head: Callable[[bytes], None] = lambda head: None,
    progress: Progress = lambda done, total: None,
    max_bytes: int | None = None,
) -> Path:
    """The path of the file behind a link, downloaded into a folder unless it is already there.

    The name is the server's with a hash of the link: it replaces no other file, and a later call finds it
    without asking the server.

    Args:
        url: https link; its redirects may lead to other hosts.
        folder: where the file goes, and its partial file until it is whole and checked.
        suffix: of the server's name for the file, such as `.safetensors`; another one is refused.
        check: raises `ValueError` when the whole file is not what it should be; it is deleted then.
        check_head: the same for its first `HEAD_BYTES`, before the rest is read.
        progress: called with (bytes done, bytes in all or 0); may raise to cancel, and a later call resumes.
        max_bytes: limit of the size; None is WAN21_MAX_DOWNLOAD_GB.

    Raises:
        Refusal: the link is not allowed, cannot be reached or is not what it should be. Its text leaves out
            the queries of links, which may hold access tokens.
        ValueError: of `check` and `check_head`.
    """
    _check_allowed()
    url, folder = url.strip(), Path(folder)
    check_link(url)
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    part = folder / f".{mark}.part"
    with _LOCK, _alone(part, progress):
        present = next(folder.glob(f"*-{mark}{suffix}"), None)
        if present is not None:
            return present
        folder.mkdir(parents=True, exist_ok=True)
        limit = max_download_bytes() if max_bytes is None else max_bytes
        try:
            name = _download(url, part, suffix, check_head, progress, limit)
        except (OSError, http.client.HTTPException) as error:
            raise Refusal(
                f"{shown(url)} could not be read ({type(error).__name__}: {error})",
                "Try again: what is there is kept",
            ) from error
        if refused := _refused(check, part):
            _forget(part)
            raise refused
        whole = folder / f"{name}-{mark}{suffix}"
        os.replace(part, whole)
        _forget(part)
        return whole


def fetch_bytes(url: str, max_bytes: int, seconds: float) -> bytes:
    """The body behind a link, for small files such as pictures; nothing is kept.

    Args:
        url: https link; its redirects may lead to other hosts.
        max_bytes: limit of the size.
        seconds: limit of the whole transfer.

    Raises:
        Refusal: as in `fetch`.
    """
    _check_allowed()
    try:
        with open_link(url, HEADERS, seconds=seconds) as (response, _):
            _check_status(response.status, url)
            body = response.read(max_bytes + 1)
            if response.length and len(body) <= max_bytes:  # what is left; `read(n)` says nothing of it
                raise http.client.IncompleteRead(body, response.length)
    except (OSError, http.client.HTTPException) as error:
        raise Refusal(
            f"{shown(url)} could not be read ({type(error).__name__}: {error})",
            "Open it in a browser, and try again",
        ) from error
    if len(body) > max_bytes:
        raise Refusal(
            f"{shown(url)} has more than {max_bytes / 1e6:.2f} MB, the most that is fetched",
            "Use a smaller file",
        )
    return body


@contextlib.contextmanager
def _alone(part: Path, progress: Progress) -> Iterator[None]:
    """Waits while another process of this machine fetches the same file: stations share their folders.

    Args:
        progress: called while it waits; may raise to cancel.
    """
    mark = hashlib.sha256(str(part.absolute()).encode()).hexdigest()[:16]
    lock = FileLock(Path(tempfile.gettempdir()) / f"wan21-{mark}.lock")
    while True:
        try:
            lock.acquire(timeout=WAIT_SECONDS)
            break
        except Timeout:
            progress(0, 0)
        except OSError:  # it is another user's
            break
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # on Windows, of a file that somebody waits for
                os.unlink(lock.lock_file)
            lock.release()


def _check_allowed() -> None:
    if not downloads_allowed():
        raise Refusal(
            "downloads are turned off on this server (WAN21_NO_DOWNLOADS)", "Put the file into its folder"
        )


# --- the body -----------------------------------------------------------------------------------------


def _download(
    url: str,
    part: Path,
    suffix: str,
    check_head: Callable[[bytes], None],
    progress: Progress,
    limit: int,
) -> str:
    """The name of a file, without suffix, once its partial file is whole; resumed if the server can."""
    state = _state(part)
    done = part.stat().st_size if part.is_file() and state.get("etag") else 0
    headers = HEADERS
    if done:
        headers = headers | {"Range": f"bytes={done}-", "If-Range": state["etag"]}
    with open_link(url, headers, seconds=FETCH_SECONDS) as (response, last):
        if response.status == 416 and done == state.get("total"):  # the whole file was there already
            return state["name"]
        _check_status(response.status, url)
        if response.status != 206 or not _continues(response, done):
            done = 0
        name = _name(response, url, last, suffix)
        total = done + min(response.length, MOST) if response.length else 0
        _check_room(total, done, limit, part, url)
        _remember(part, {"etag": _etag(response), "total": total, "name": name})
        try:
            _copy(response, part, done, total, check_head, progress, limit, url)
        except ValueError:
            _forget(part)
            raise
        return name


def _check_status(status: int, url: str) -> None:
    if status in (401, 403):
        raise Refusal(
            f"{shown(url)} needs a login ({status})",
            "Use a link with an access token, or download the file in a browser",
        )
    if status not in (200, 206):
        raise Refusal(f"{shown(url)} answers {status}, not a file", "Copy the download link again")


def _continues(response: http.client.HTTPResponse, done: int) -> bool:
    span = re.fullmatch(r"bytes (\d{1,19})-\d+/(\d+|\*)", response.getheader("Content-Range", ""))
    return span is not None and int(span[1]) == done


def _etag(response: http.client.HTTPResponse) -> str:
    etag = response.getheader("ETag", "")
    return etag if etag.startswith('"') else ""  # a weak ETag does not promise equal bytes


def _check_room(total: int, done: int, limit: int, part: Path, url: str) -> None:
    if total > limit:
        raise Refusal(
            f"{shown(url)} is {total / 1e9:.2f} GB; at most {limit / 1e9:.2f} GB are fetched", RAISE_LIMIT
        )
    free = shutil.disk_usage(part.parent).free
    if total - done > free:
        raise Refusal(
            f"{shown(url)} needs {(total - done) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free",
            "Free some space on the server's disk",
        )


def _copy(
    response: http.client.HTTPResponse,
    part: Path,
    done: int,
    total: int,
    check_head: Callable[[bytes], None],
    progress: Progress,
    limit: int,
    url: str,
) -> None:
    """The rest of a body goes into its partial file behind the bytes that are done."""
    head = b"" if done == 0 else None
    with part.open("r+b" if done else "wb") as file:
        file.seek(done)
        file.truncate()
        while piece := response.read1(PIECE_BYTES):
            done += len(piece)
            if done > limit:
                raise Refusal(
                    f"{shown(url)} sends more than the {limit / 1e9:.2f} GB that are fetched at most",
                    RAISE_LIMIT,
                )
            if head is not None:
                head += piece[: HEAD_BYTES - len(head)]
                if len(head) == HEAD_BYTES or done == total:
                    check_head(head)
                    head = None
            file.write(piece)
            progress(done, total)
    if total and done < total:
        raise http.client.IncompleteRead(b"", total - done)


# --- names and partial files --------------------------------------------------------------------------


def _name(response: http.client.HTTPResponse, url: str, last: str, suffix: str) -> str:
    """A harmless file name, without suffix, from the server's header or else from a link's path.

    Args:
        url: the link that was given.
        last: the link that redirects led to.
        suffix: of the file in the header or a link; another one is refused.
    """
    disposition = response.getheader("Content-Disposition", "")
    extended = re.search(r"filename\*\s*=\s*[\w-]*'[\w-]*'([^;]+)", disposition, re.IGNORECASE)
    plain = re.search(r'filename\s*=\s*(?:"([^"]*)"|([^;]+))', disposition, re.IGNORECASE)
    given = urllib.parse.unquote(extended[1]) if extended else (plain and (plain[1] or plain[2]))
    paths = [urllib.parse.unquote(urllib.parse.urlsplit(u).path) for u in (url, last)]
    names = [re.split(r"[/\\]", text.strip())[-1] for text in (given or "", *paths)]
    name = next((name for name in names if name.lower().endswith(suffix)), None)
    if name is None:
        kind = response.getheader("Content-Type", "of no stated type")
        raise Refusal(
            f"{shown(url)} leads to {next(filter(None, names), 'a page')!r} ({kind}), not to a {suffix} file",
            "Copy the download link of the file itself",
        )
    stem = re.sub(r"[^\w.+ ()\[\]-]", "_", name[: -len(suffix)]).strip(". ")
    return stem.encode()[:MAX_NAME].decode(errors="ignore") or "download"


def _sidecar(part: Path) -> Path:
    return part.with_suffix(".json")


def _state(part: Path) -> dict[str, Any]:
    try:
        return json.loads(_sidecar(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(part: Path, state: dict[str, Any]) -> None:
    _sidecar(part).write_text(json.dumps(state), encoding="utf-8")


def _refused(check: Callable[[Path], None], part: Path) -> ValueError | None:
    """What a check says against a file; without tracebacks, whose frames keep the file mapped.

    Windows deletes no mapped file: it would stay, and every further try would find it whole and fail on it.
    """
    try:
        check(part)
    except ValueError as error:
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)
