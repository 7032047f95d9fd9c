"""Downloads of links that people give: bounded, resumable, checked before use.

Where a link may lead is the rule of `links`. Settings of the server's owner, read at each call:
WAN21_NO_DOWNLOADS=1 turns downloads off; WAN21_MAX_DOWNLOAD_GB (16) bounds one file.
"""

import hashlib
import http.client
import json
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from .links import check_link, open_link, shown

HEADERS = {"User-Agent": "wan21-i2v"}
PIECE_BYTES = 1 << 20
FETCH_SECONDS = 6 * 3600  # for one call of `fetch`; the next goes on from there
HEAD_BYTES = 1 << 16  # what `check_head` sees
MAX_NAME = 120  # bytes
DEFAULT_MAX_GB = 16.0
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
    """Bring the file behind a link into a folder, once.

    The file is named as the server names it, with a mark made from the link, so it never takes the place of
    another file and is found again without asking the server.

    Args:
        url: https link; its redirects may lead to other hosts.
        folder: where the file goes, and its partial file until it is whole and checked.
        suffix: that the server's name for the file must have, such as `.safetensors`.
        check: raises `ValueError` when the whole file is not what it should be; it is deleted then.
        check_head: the same for its first bytes, before the rest is read.
        progress: called with (bytes done, bytes in all or 0); may raise to cancel. A later call goes on
            from there.
        max_bytes: bound of the size; WAN21_MAX_DOWNLOAD_GB without it.

    Raises:
        ValueError: the link is not allowed, cannot be reached or is not what it should be; says which.
            Queries of links, where access tokens stand, are not repeated in it.
    """
    _check_allowed()
    url, folder = url.strip(), Path(folder)
    check_link(url)
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    with _LOCK:
        present = next(folder.glob(f"*-{mark}{suffix}"), None)
        if present is not None:
            return present
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{mark}.part"
        limit = _max_bytes() if max_bytes is None else max_bytes
        try:
            name = _download(url, part, suffix, check_head, progress, limit)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{shown(url)} could not be read ({type(error).__name__}: {error}). Try again: what is there "
                "is kept"
            ) from error
        try:
            check(part)
        except ValueError:
            _forget(part)
            raise
        whole = folder / f"{name}-{mark}{suffix}"
        os.replace(part, whole)  # the mark is this link's own: nothing else can be there
        _forget(part)
        return whole


def fetch_bytes(url: str, max_bytes: int, seconds: float) -> bytes:
    """The body behind a link, for small files such as pictures; nothing is kept.

    Args:
        url: https link; its redirects may lead to other hosts.
        max_bytes: bound of the size.
        seconds: for the whole transfer.

    Raises:
        ValueError: as in `fetch`.
    """
    _check_allowed()
    try:
        with open_link(url, HEADERS, seconds=seconds) as (response, _):
            _check_status(response.status, url)
            body = response.read(max_bytes + 1)
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(f"{shown(url)} could not be read ({type(error).__name__}: {error})") from error
    if len(body) > max_bytes:
        raise ValueError(f"{shown(url)} has more than {max_bytes / 1e6:.2f} MB, the most that is fetched")
    return body


def _check_allowed():
    if os.environ.get("WAN21_NO_DOWNLOADS") == "1":
        raise ValueError(
            "downloads are turned off on this server (WAN21_NO_DOWNLOADS). Put the file into its folder"
        )


def _max_bytes():
    text = os.environ.get("WAN21_MAX_DOWNLOAD_GB", "")
    try:
        return int(float(text or DEFAULT_MAX_GB) * 1e9)
    except ValueError as error:
        raise ValueError(f"WAN21_MAX_DOWNLOAD_GB is {text!r}; it must be a number of gigabytes") from error


# --- the body -----------------------------------------------------------------------------------------


def _download(url, part, suffix, check_head, progress, limit):
    """Fill the partial file, from where it stands if the server can; the file's name, without suffix."""
    state = _state(part)
    done = part.stat().st_size if part.is_file() and state.get("etag") else 0
    headers = HEADERS
    if done:
        headers = headers | {"Range": f"bytes={done}-", "If-Range": state["etag"]}
    with open_link(url, headers, seconds=FETCH_SECONDS) as (response, last):
        if response.status == 416 and done == state.get("total"):  # everything is there already
            return state["name"]
        _check_status(response.status, url)
        if response.status != 206 or not _continues(response, done):
            done = 0
        name = _name(response, url, last, suffix)
        length = response.getheader("Content-Length")
        total = done + int(length) if length and length.isdecimal() else 0
        _check_room(total, done, limit, part, url)
        _remember(part, {"etag": _etag(response), "total": total, "name": name})
        try:
            _copy(response, part, done, total, check_head, progress, limit, url)
        except ValueError:
            _forget(part)
            raise
        return name


def _check_status(status, url):
    if status in (401, 403):
        raise ValueError(
            f"{shown(url)} needs a login ({status}). Use a link with an access token, or download the file "
            "in a browser"
        )
    if status not in (200, 206):
        raise ValueError(f"{shown(url)} answers {status}, not a file. Copy the download link again")


def _continues(response, done):
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.getheader("Content-Range", ""))
    return span is not None and int(span[1]) == done


def _etag(response):
    etag = response.getheader("ETag", "")
    return etag if etag.startswith('"') else ""  # a weak one does not promise equal bytes


def _check_room(total, done, limit, part, url):
    if total > limit:
        raise ValueError(
            f"{shown(url)} is {total / 1e9:.2f} GB; at most {limit / 1e9:.2f} GB are fetched. The server's "
            "owner may raise WAN21_MAX_DOWNLOAD_GB"
        )
    free = shutil.disk_usage(part.parent).free
    if total - done > free:
        raise ValueError(f"{shown(url)} needs {(total - done) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def _copy(response, part, done, total, check_head, progress, limit, url):
    head = b"" if done == 0 else None
    with part.open("r+b" if done else "wb") as file:
        file.seek(done)
        file.truncate()
        while piece := response.read1(PIECE_BYTES):
            done += len(piece)
            if done > limit:
                raise ValueError(
                    f"{shown(url)} sends more than the {limit / 1e9:.2f} GB that are fetched at most"
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


def _name(response, url, last, suffix):
    """A harmless file name, without suffix, from the server's header or else from the link's path."""
    disposition = response.getheader("Content-Disposition", "")
    extended = re.search(r"filename\*\s*=\s*[\w-]*'[\w-]*'([^;]+)", disposition, re.IGNORECASE)
    plain = re.search(r'filename\s*=\s*(?:"([^"]*)"|([^;]+))', disposition, re.IGNORECASE)
    given = urllib.parse.unquote(extended[1]) if extended else (plain and (plain[1] or plain[2]))
    paths = [urllib.parse.unquote(urllib.parse.urlsplit(u).path) for u in (url, last)]
    names = [re.split(r"[/\\]", text.strip())[-1] for text in (given or "", *paths)]
    name = next((name for name in names if name.lower().endswith(suffix)), None)
    if name is None:
        kind = response.getheader("Content-Type", "of no stated type")
        raise ValueError(
            f"{shown(url)} leads to {next(filter(None, names), 'a page')!r} ({kind}), not to a {suffix} "
            "file. Copy the download link of the file itself"
        )
    stem = re.sub(r"[^\w.+ ()\[\]-]", "_", name[: -len(suffix)]).strip(". ")
    return stem.encode()[:MAX_NAME].decode(errors="ignore") or "download"


def _sidecar(part):
    return part.with_suffix(".json")


def _state(part):
    try:
        return json.loads(_sidecar(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(part, state):
    _sidecar(part).write_text(json.dumps(state), encoding="utf-8")


def _forget(part):
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)
