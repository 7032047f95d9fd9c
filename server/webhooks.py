"""One POST at the end of a task, retried until it is taken, signed when there is a secret."""

import asyncio
import contextlib
import hashlib
import hmac
import http.client
import json
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..net.links import open_link
from .problems import as_part
from .settings import Settings
from .snapshot import snapshot
from .store import Store, TaskRow
from .waiting import within

TIMEOUT_S = 15
IDLE_SECONDS = 1  # between looks at the store when nobody calls `wake`
FAILED_SECONDS = 30  # pause after an error of our own, such as a full disk
MAX_ERROR = 300  # characters
SENDERS = 8
SENDERS_PER_OWNER = 4  # below SENDERS: the silent receivers of one owner do not delay the others


class Webhooks:
    """Delivers what is due in the store, so that a restart loses nothing.

    A receiver may get the same event twice; `X-Wan21-Delivery`, the task's id, is the same then.
    """

    def __init__(self, store: Store, settings: Settings):
        self._store = store
        self._settings = settings
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False
        self._sending: dict[str, tuple[str, asyncio.Task[None]]] = {}  # task id -> (owner, its delivery)
        self._senders = ThreadPoolExecutor(SENDERS, thread_name_prefix="wan21-webhook")

    async def start(self) -> None:
        """Begins to deliver."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Ends deliveries; an event whose delivery was not stored yet is sent again after a restart."""
        self._stopping = True
        self.wake()
        if self._task is not None:
            await self._task
        deliveries = [delivery for _, delivery in self._sending.values()]
        for delivery in deliveries:
            delivery.cancel()
        await asyncio.gather(*deliveries, return_exceptions=True)
        self._senders.shutdown(wait=False)

    def wake(self) -> None:
        """Lets due webhooks be looked for now."""
        self._wake.set()

    async def _run(self) -> None:
        while not self._stopping:
            try:
                waiting = [name for name, n in self._sending_of().items() if n >= SENDERS_PER_OWNER]
                for row in await self._store.due_webhooks(time.time(), [*self._sending], waiting):
                    if self._sending_of()[row.owner] < SENDERS_PER_OWNER:
                        sending = asyncio.get_running_loop().create_task(self._deliver(row))
                        self._sending[row.id] = row.owner, sending
            except Exception:
                logging.exception("Wan2.1 jobs: webhooks could not be sent")
            with contextlib.suppress(TimeoutError):
                await within(IDLE_SECONDS, self._wake.wait())
            self._wake.clear()

    def _sending_of(self) -> Counter[str]:
        """The number of deliveries that each owner has under way."""
        return Counter(owner for owner, _ in self._sending.values())

    async def _deliver(self, row: TaskRow) -> None:
        try:
            loop = asyncio.get_running_loop()
            error = await loop.run_in_executor(self._senders, post, row, self._settings.webhook_secret)
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
        except Exception:
            logging.exception("Wan2.1 jobs: the webhook of %s could not be handled", row.id)
            await asyncio.sleep(FAILED_SECONDS)  # the attempt is not counted, so it is due again at once
        finally:
            del self._sending[row.id]
            self.wake()


def post(row: TaskRow, secret: str | None) -> str:
    """Sends the event of a task once, and says what went wrong, if anything. Blocking."""
    body = json.dumps(payload(row)).encode()
    headers = {"Content-Type": "application/json", "X-Wan21-Delivery": row.id}
    if secret:
        headers |= signature(secret, body, int(time.time()))
    try:
        with open_link(row.webhook or "", headers, TIMEOUT_S, "POST", body, redirects=0) as (response, _):
            return "" if response.status < 300 else f"the receiver answered {response.status}"
    except (ValueError, OSError, http.client.HTTPException) as error:
        return as_part(str(error)) or type(error).__name__


def payload(row: TaskRow) -> dict[str, Any]:
    """The event: a part of the task as clients see it."""
    whole = snapshot(row)
    names = ("id", "status", "output", "error", "session_id", "created_at", "updated_at")
    return {name: whole[name] for name in names}


def signature(secret: str, body: bytes, timestamp: int) -> dict[str, str]:
    """Headers by which a receiver can check where an event is from and when it was sent.

    The signature is the HMAC-SHA256 of `timestamp.body` under the secret, in hexadecimal.
    """
    mac = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256)
    return {"X-Wan21-Timestamp": str(timestamp), "X-Wan21-Signature": f"sha256={mac.hexdigest()}"}
