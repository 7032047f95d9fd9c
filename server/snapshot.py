"""A task as clients see it."""

import json
from datetime import datetime, timezone
from typing import Any

from .store import TaskRow

PUBLIC_PREFIX = "task_"


def snapshot(row: TaskRow) -> dict[str, Any]:
    """The whole task as clients see it."""
    return {
        "id": row.id,
        "short_id": row.id.removeprefix(PUBLIC_PREFIX)[:8],
        "status": row.status,
        "app": row.app,
        "function": "run",
        "input": row.input,
        "output": row.output,
        "error": row.error,
        "logs": row.logs,
        "progress": row.progress,
        "session_id": row.session_id,
        "metadata": row.meta,
        "webhook": row.webhook,
        "webhook_delivery": {
            "state": row.hook_state,
            "attempts": row.hook_attempts,
            "error": row.hook_error,
        },
        "created_at": iso_time(row.created_at),
        "updated_at": iso_time(row.updated_at),
    }


def snapshot_line(row: TaskRow) -> bytes:
    """The task as one line of JSON."""
    return json.dumps(snapshot(row)).encode() + b"\n"


def iso_time(seconds: float) -> str:
    """Seconds since 1970 as a UTC time in ISO 8601."""
    text = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
