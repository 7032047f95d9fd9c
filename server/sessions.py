"""Sessions, as far as the client needs them: a name that runs share, with an end."""

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

from .problems import Problem
from .store import SessionRow, Store

DEFAULT_SECONDS, MAX_SECONDS = 300, 3600
NEW = "new"


class Sessions:
    """The sessions of all owners."""

    def __init__(self, store: Store):
        self._store = store

    async def enter(self, owner: str, name: Any, timeout: Any) -> str | None:
        """The id of the session of a run, None for a run without one.

        Args:
            name: "new", the id of an active session, or None; from the client, so of any type.
            timeout: as of `check_timeout`.

        Raises:
            Problem: 404 or 410 for a session that is unknown or over.
        """
        if name is None:
            return None
        if name != NEW:
            row = await self.get(owner, name)
            await self._renew(row, calls=1)
            return row.id
        seconds = DEFAULT_SECONDS if timeout is None else int(timeout)
        now = time.time()
        row = SessionRow(f"sess_{secrets.token_hex(16)}", owner, seconds, now, now + seconds, calls=1)
        await self._store.add(row)
        return row.id

    async def get(self, owner: str, session_id: Any) -> SessionRow:
        """The row of an active session.

        Raises:
            Problem: 404 for one that is unknown, 410 for one that is over.
        """
        row = await self._store.get(SessionRow, session_id) if isinstance(session_id, str) else None
        if row is None or row.owner != owner:
            raise Problem(404, "There is no such session.")
        if state_of(row) != "active":
            raise Problem(410, f"The session is {state_of(row)}.")
        return row

    async def list(self, owner: str) -> Sequence[SessionRow]:
        """The active sessions of an owner."""
        now = time.time()
        conditions = (SessionRow.owner == owner, SessionRow.ended.is_(False), SessionRow.expires_at > now)
        return await self._store.select(SessionRow, *conditions, order=SessionRow.created_at)

    async def keep_alive(self, owner: str, session_id: str) -> SessionRow:
        """Starts the idle time of a session again."""
        row = await self.get(owner, session_id)
        await self._renew(row, calls=0)
        return row

    async def end(self, owner: str, session_id: str) -> None:
        """Ends a session; its tasks go on."""
        row = await self.get(owner, session_id)
        row.ended = True
        await self._store.save(row, "ended")

    async def _renew(self, row: SessionRow, calls: int) -> None:
        row.calls += calls
        row.expires_at = time.time() + row.idle_seconds
        await self._store.write(row, {"calls": SessionRow.calls + calls, "expires_at": row.expires_at})


def check_timeout(timeout: Any) -> None:
    """Checks the seconds without a run after which a new session expires; None is the default.

    Args:
        timeout: from the client, so of any type.

    Raises:
        Problem: 422.
    """
    is_whole = isinstance(timeout, int | float) and not isinstance(timeout, bool) and timeout % 1 == 0
    if timeout is not None and not (is_whole and 1 <= timeout <= MAX_SECONDS):
        raise Problem(422, f"session_timeout must be a whole number from 1 to {MAX_SECONDS}")


def state_of(row: SessionRow) -> Literal["active", "ended", "expired"]:
    """Whether a session can still be used, and why not."""
    if row.ended:
        return "ended"
    return "active" if row.expires_at > time.time() else "expired"
