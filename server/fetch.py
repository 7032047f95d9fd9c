"""Fetch one file from a URL that a client gave."""

import asyncio
import os
from pathlib import Path

import aiohttp
from yarl import URL

from .addresses import ForbiddenUrl, check_url, guarded_session

MAX_REDIRECTS = 5
CHUNK_BYTES = 2**18


class FetchError(ValueError):
    """A file that could not, or must not, be fetched; the message says why."""


def fetch(url, target: Path, *, max_bytes, accept, timeout_s, progress=None):
    """Write the file at `url` to `target`; on failure nothing is left there.

    Only https and public addresses, on every hop, unless WAN21_ALLOW_PRIVATE_URLS=1; nothing at all with
    WAN21_NO_DOWNLOADS=1. Blocking: for a thread without a running event loop.

    Args:
        target: path of the file to write.
        max_bytes: more is an error, told before it is stored.
        accept: media types that the answer may have, such as ("image/png",); empty accepts any.
        timeout_s: for the whole transfer, in seconds.
        progress: called with (bytes so far, bytes in all or None).

    Raises:
        FetchError: the URL is refused, the transfer failed, or the answer is too large or of another type.
    """
    if os.environ.get("WAN21_NO_DOWNLOADS") == "1":
        raise FetchError("downloads are switched off on this server")
    allow_private = os.environ.get("WAN21_ALLOW_PRIVATE_URLS") == "1"
    try:
        asyncio.run(_fetch(url, target, allow_private, max_bytes, accept, timeout_s, progress))
    except ForbiddenUrl as error:
        raise FetchError(str(error)) from error
    except TimeoutError as error:
        raise FetchError(f"it took longer than {timeout_s:g} s") from error
    except (aiohttp.ClientError, OSError) as error:
        raise FetchError(f"it could not be fetched: {error}") from error


async def _fetch(url, target, allow_private, max_bytes, accept, timeout_s, progress):
    async with guarded_session(allow_private, timeout_s) as session:
        for _ in range(MAX_REDIRECTS + 1):
            checked = check_url(url, allow_private)
            async with session.get(checked, allow_redirects=False) as answer:
                if answer.status not in (301, 302, 303, 307, 308):
                    return await _store(answer, target, max_bytes, accept, progress)
                url = str(answer.url.join(URL(answer.headers.get("Location", ""))))
    raise FetchError(f"it redirects more than {MAX_REDIRECTS} times")


async def _store(answer, target, max_bytes, accept, progress):
    if answer.status != 200:
        raise FetchError(f"the server answered {answer.status}")
    if accept and answer.content_type not in accept:
        raise FetchError(f"it is {answer.content_type}; accepted are {', '.join(accept)}")
    too_large = FetchError(f"it is larger than {max_bytes} bytes")
    if (answer.content_length or 0) > max_bytes:
        raise too_large
    received = 0
    try:
        with open(target, "wb") as file:
            async for chunk in answer.content.iter_chunked(CHUNK_BYTES):
                received += len(chunk)
                if received > max_bytes:
                    raise too_large
                file.write(chunk)
                if progress is not None:
                    progress(received, answer.content_length)
    except BaseException:
        Path(target).unlink(missing_ok=True)
        raise
