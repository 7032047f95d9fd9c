"""Errors for clients: problem+json (RFC 9457), with the keys that every version of the client reads."""

import errno
from collections.abc import Iterable, Mapping

from aiohttp import web
from sqlalchemy.exc import DatabaseError, OperationalError

_TITLES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    408: "request_timeout",
    409: "conflict",
    410: "gone",
    413: "too_large",
    422: "validation_error",
    429: "rate_limited",
    500: "internal_error",
    503: "unavailable",
    507: "insufficient_storage",
}


class Problem(Exception):
    """An error for the client.

    Args:
        status: HTTP status, one of those above.
        detail: one sentence for the person.
        errors: for a 422, [{"path": "input.field", "message": ...}].
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        detail: str,
        errors: Iterable[Mapping[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = list(errors)
        self.headers = dict(headers or {})

    def response(self) -> web.Response:
        """The problem as an HTTP response."""
        code = _TITLES[self.status]
        body = {
            "type": f"https://inference.sh/errors/{code}",  # the client takes its error code from here
            "title": code,
            "status": self.status,
            "detail": self.detail,
            "success": False,
            "error": {"code": code, "message": self.detail},
        }
        if self.errors:
            body["errors"] = self.errors
        return web.json_response(
            body, status=self.status, headers=self.headers, content_type="application/problem+json"
        )


def disk_is_full(error: BaseException) -> bool:
    """Whether the system or the database says that there is no room."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or (isinstance(error, OperationalError) and "is full" in str(error.orig))


def of_storage(error: Exception) -> Problem | None:
    """The problem that an error of the server's own disk or database is to clients, None for other errors."""
    if disk_is_full(error):
        return Problem(
            507,
            "The server's disk is full. Delete files of tasks that are over, or tell the server's owner.",
            headers={"Retry-After": "60"},
        )
    if isinstance(error, OperationalError) or type(error) is DatabaseError:  # locked; damaged
        return Problem(
            503,
            f"The server's database does not answer ({error.orig}); send the request again.",
            headers={"Retry-After": "10"},
        )
    return None


def invalid(*errors: tuple[str, str]) -> Problem:
    """The 422 for (field, message) pairs; an empty field is the input as a whole."""
    listed = [
        {"path": f"input.{field}" if field else "input", "message": as_part(message)}
        for field, message in errors
    ]
    detail = "; ".join(f"{error['path']}: {error['message']}" for error in listed)
    return Problem(422, detail, listed)


def as_part(text: str) -> str:
    """A sentence as a part of a longer one: without the full stop at its end."""
    return text if text.endswith("..") else text.removesuffix(".")


def of_node(node_class: str, message: str) -> str:
    """A node's message with the node's name once in front, where our own nodes put it themselves."""
    message = without_name(node_class, message)
    return f"{node_class}: {message}" if node_class else message


def without_name(node_class: str, message: str) -> str:
    """A node's message without the node's name in front."""
    return message.strip().removeprefix(f"{node_class}: ") if node_class else message.strip()
