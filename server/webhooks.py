"""One POST at the end of a task, retried until it is taken, signed when there is a secret."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import logging
import time

import aiohttp

from .addresses import ForbiddenUrl, check_url, guarded_session
from .tasks import snapshot

SCHEMES = ("https", "http")
TIMEOUT_S = 15
IDLE_SECONDS = 1
MAX_ERROR = 300


class Webhooks:
    """Delivers what is due in the store, so that a restart changes nothing.

    A receiver may get the same event twice and can tell by `X-Wan21-Delivery`, which is the task's id.
    """

    def __init__(self, store, settings):
        self._store = store
        self._settings = settings
        self._wake = asyncio.Event()
        self._task = None

    async def start(self):
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self):
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    def wake(self):
        """Look for due webhooks now."""
        self._wake.set()

    async def _run(self):
        while True:
            try:
                due = await self._store.due_webhooks(time.time())
                await asyncio.gather(*(self._deliver(row) for row in due))
            except Exception:
                logging.exception("Wan2.1 jobs: webhooks could not be sent")
                due = []
            if not due:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), IDLE_SECONDS)
                self._wake.clear()

    async def _deliver(self, row):
        error = await self._post(row)
        row.hook_attempts += 1
        row.hook_error = error[:MAX_ERROR]
        delays = self._settings.webhook_delays
        if not error:
            row.hook_state = "delivered"
        elif row.hook_attempts > len(delays):
            row.hook_state = "failed"
        else:
            row.hook_next = time.time() + delays[row.hook_attempts - 1]
        await self._store.save(row, "hook_state", "hook_attempts", "hook_error", "hook_next")

    async def _post(self, row):
        """Send it once. Returns what went wrong, empty when the receiver took it."""
        body = json.dumps(payload(row)).encode()
        headers = {"Content-Type": "application/json", "X-Wan21-Delivery": row.id}
        if self._settings.webhook_secret:
            headers |= signature(self._settings.webhook_secret, body, int(time.time()))
        try:
            url = check_url(row.webhook, self._settings.allow_private_urls, SCHEMES)
            async with (
                guarded_session(self._settings.allow_private_urls, TIMEOUT_S) as session,
                session.post(url, data=body, headers=headers, allow_redirects=False) as answer,
            ):
                return "" if answer.status < 300 else f"the receiver answered {answer.status}"
        except asyncio.TimeoutError:
            return f"the receiver did not answer within {TIMEOUT_S} s"
        except (ForbiddenUrl, aiohttp.ClientError, OSError) as error:
            return str(error)


def payload(row):
    """Return the event, a part of the task."""
    whole = snapshot(row)
    names = ("id", "status", "output", "error", "session_id", "created_at", "updated_at")
    return {name: whole[name] for name in names}


def signature(secret, body, timestamp):
    """Return the headers that let a receiver check where an event is from, and when it was sent.

    The signature is the HMAC-SHA256 of `timestamp.body` under the secret, in hexadecimal.
    """
    mac = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return {"X-Wan21-Timestamp": str(timestamp), "X-Wan21-Signature": f"sha256={mac.hexdigest()}"}
