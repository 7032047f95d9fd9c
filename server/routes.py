"""The routes, in the wire protocol of the client `inferencesh`."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpProcessingError
from aiohttp.web import RequestPayloadError

from .access import Gate, RateLimit
from .files import Files, Removed, described
from .fleet import Fleet
from .jobs import APP, Jobs
from .metrics import exposition
from .problems import Problem, as_part, of_storage
from .sessions import Sessions, state_of
from .settings import Settings
from .snapshot import iso_time, snapshot, snapshot_line
from .store import FileRow, SessionRow, TaskRow
from .tasks import Tasks
from .waiting import within

PREFIX = "/wan21"
MAX_BODY_BYTES = 2**20
BODY_SECONDS = 20
RETRY_SECONDS = 10
SNAPSHOT_SECONDS = 8  # the client leaves a stream that sends nothing for 30 s
UPLOAD = "upload"
OPERATOR = "operator"  # routes whose names begin with this are not for clients
MEDIA = ("image/", "video/", "text/plain")  # shown in a browser; other types are downloads

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Routes:
    """One handler a route, over the parts of the API; docs/job-api.md says what each answers."""

    def __init__(
        self,
        settings: Settings,
        gate: Gate,
        limit: RateLimit,
        files: Files,
        tasks: Tasks,
        sessions: Sessions,
        jobs: Jobs,
        fleet: Fleet | None = None,
    ):
        self._settings = settings
        self._gate = gate
        self._limit = limit
        self._files = files
        self._tasks = tasks
        self._sessions = sessions
        self._jobs = jobs
        self._fleet = fleet

    def table(self) -> list[web.RouteDef]:
        """The routes, without the prefix."""
        return [
            web.get(f"/apps/{APP}", self.schema),
            web.post("/apps/run", self.run),
            web.get("/tasks/{id}", self.task),
            web.get("/tasks/{id}/status", self.status),
            web.get("/tasks/{id}/stream", self.stream),
            web.get("/tasks/{id}/preview", self.preview),
            web.post("/tasks/{id}/cancel", self.cancel),
            web.delete("/tasks/{id}", self.delete),
            web.get("/tasks/{id}/files", self.task_files),
            web.delete("/tasks/{id}/files", self.delete_task_files),
            web.post("/files", self.announce),
            web.put("/upload/{token}", self.upload, name=UPLOAD),
            web.get("/files/{id}", self.download),
            web.get("/files/{id}/{name}", self.download),
            web.get("/sessions", self.session_list),
            web.get("/sessions/{id}", self.session),
            web.delete("/sessions/{id}", self.end_session),
            web.post("/sessions/{id}/keepalive", self.keep_session),
            web.get("/stations", self.stations, name=OPERATOR),
            web.get("/metrics", self.metrics, name=f"{OPERATOR}.metrics"),
        ]

    @web.middleware
    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses who may not call, and answers every error as a problem."""
        try:
            name = request.match_info.route.name or ""
            if name.startswith(OPERATOR):
                self._gate.check_operator(request)
            elif name != UPLOAD:
                self._owner(request)
            return await handler(request)
        except Problem as problem:
            return problem.response()
        except web.HTTPException as error:
            if error.status < 400:
                raise
            known = error.status if error.status in (404, 413) else 400
            return Problem(known, error.reason).response()
        except (HttpProcessingError, RequestPayloadError) as error:
            return Problem(400, f"the body cannot be read ({as_part(str(error))})").response()
        except (ConnectionResetError, asyncio.CancelledError):
            raise  # the client is gone
        except Exception as error:
            logging.exception("Wan2.1 jobs: %s %s failed", request.method, request.path)
            if problem := of_storage(error):
                return problem.response()
            return Problem(500, "The server made an error; its log says which.").response()

    # --- runs and tasks --------------------------------------------------------------------------------

    async def schema(self, request: web.Request) -> web.Response:
        """The JSON Schema of the input."""
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        return web.json_response(schema | self._jobs.input_model().model_json_schema())

    async def run(self, request: web.Request) -> web.Response:
        self._limit.take(self._owner(request))
        params = await _json_body(request)
        row = await self._jobs.submit(self._owner(request), params, self._base_url(request))
        return _answer(snapshot(row))

    async def task(self, request: web.Request) -> web.Response:
        return _answer(snapshot(await self._task(request)))

    async def status(self, request: web.Request) -> web.Response:
        whole = snapshot(await self._task(request))
        return _answer({name: whole[name] for name in ("id", "status", "updated_at")})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        """Snapshots as lines of JSON: the present one at once, one per change, one every few seconds."""
        row = await self._task(request)
        response = web.StreamResponse(
            headers={
                "Content-Type": "application/x-ndjson; charset=utf-8",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
            }
        )
        await response.prepare(request)
        with self._tasks.follow(row.id) as reader:
            if reader is None:
                row = await self._task(request)  # it may have ended since
            await response.write(snapshot_line(row))
            while reader is not None:
                try:
                    line = await within(SNAPSHOT_SECONDS, reader.get())
                except TimeoutError:
                    line = snapshot_line(row)
                if line is None:
                    break
                await response.write(line)
        await response.write_eof()
        return response

    async def preview(self, request: web.Request) -> web.Response:
        preview = self._tasks.preview((await self._task(request)).id)
        if preview is None:
            raise Problem(404, "There is no preview; the task is over, or the host makes none.")
        return web.Response(
            body=preview["image"], content_type=preview["type"], headers={"Cache-Control": "no-store"}
        )

    async def cancel(self, request: web.Request) -> web.Response:
        row = await self._task(request)
        await self._tasks.cancel(row)
        return _answer(snapshot(row))

    async def delete(self, request: web.Request) -> web.Response:
        row = await self._task(request)
        self._tasks.check_over(row)
        if request.query.get("files") == "true":  # first: who is to delete them when the task is forgotten?
            _told(await self._files.remove(await self._files.of_task(row.id)))
        await self._tasks.delete(row)
        return web.Response(status=204)

    def _owner(self, request: web.Request) -> str:
        return self._gate.owner(request)

    async def _task(self, request: web.Request) -> TaskRow:
        return await self._tasks.get(self._owner(request), request.match_info["id"])

    # --- files -----------------------------------------------------------------------------------------

    async def task_files(self, request: web.Request) -> web.Response:
        rows = await self._rows_of_task(request)
        return _answer([described(row) | {"url": self._file_url(row, request)} for row in rows])

    async def delete_task_files(self, request: web.Request) -> web.Response:
        row = await self._task(request)
        self._tasks.check_over(row)
        removed = _told(await self._files.remove(await self._rows_of_task(request)))
        return _answer({"deleted": removed.deleted, "skipped": removed.skipped})

    async def _rows_of_task(self, request: web.Request) -> Sequence[FileRow]:
        row = await self._task(request)
        role = request.query.get("role")
        if role not in (None, "input", "output"):
            raise Problem(422, "role must be input or output")
        return await self._files.of_task(row.id, role)

    async def announce(self, request: web.Request) -> web.Response:
        self._limit.take(self._owner(request))
        body = await _json_body(request)
        base = self._base_url(request)
        wanted = body.get("files") if isinstance(body, dict) else None
        files = await self._files.announce(
            self._owner(request), wanted, lambda token: f"{base}/upload/{token}"
        )
        return _answer(files)

    async def upload(self, request: web.Request) -> web.Response:
        receiving = self._files.receive(request.match_info["token"], request.content)
        try:
            await asyncio.wait_for(receiving, self._settings.upload_seconds)
        except asyncio.TimeoutError:
            raise Problem(400, "The upload took too long.") from None
        return web.Response(status=204)

    async def download(self, request: web.Request) -> web.FileResponse:
        row = await self._files.find(self._owner(request), request.match_info["id"])
        shown = row.role != UPLOAD and row.content_type.startswith(MEDIA)
        kind = row.content_type if shown else "application/octet-stream"
        headers = {
            "Content-Type": kind,
            "Content-Disposition": "inline" if shown else "attachment",
            "X-Content-Type-Options": "nosniff",
        }
        return web.FileResponse(Path(row.path), headers=headers)

    def _file_url(self, row: FileRow, request: web.Request) -> str:
        return f"{self._base_url(request)}/files/{row.id}"

    # --- sessions --------------------------------------------------------------------------------------

    async def session_list(self, request: web.Request) -> web.Response:
        return _answer([_session(row) for row in await self._sessions.list(self._owner(request))])

    async def session(self, request: web.Request) -> web.Response:
        return _answer(_session(await self._sessions.get(self._owner(request), request.match_info["id"])))

    async def keep_session(self, request: web.Request) -> web.Response:
        return _answer(
            _session(await self._sessions.keep_alive(self._owner(request), request.match_info["id"]))
        )

    async def end_session(self, request: web.Request) -> web.Response:
        await self._sessions.end(self._owner(request), request.match_info["id"])
        return web.Response(status=204)

    # --- for operators ---------------------------------------------------------------------------------

    async def stations(self, request: web.Request) -> web.Response:
        """The stations of the fleet; none where this ComfyUI runs the jobs."""
        if self._fleet is None:
            return _answer([])
        if not self._fleet.stations:
            self._fleet.check_there()
        return _answer([one.described() for one in self._fleet.stations.values()])

    async def metrics(self, request: web.Request) -> web.Response:
        text, kind = exposition(self._tasks, self._fleet)
        return web.Response(body=text, headers={"Content-Type": kind})

    def _base_url(self, request: web.Request) -> str:
        return self._settings.public_url or f"{request.scheme}://{request.host}{PREFIX}"


def _told(removed: Removed) -> Removed:
    """What was removed.

    Raises:
        Problem: 503 when some could not be.
    """
    if removed.failed:
        raise Problem(
            503,
            f"{len(removed.failed)} files could not be removed ({', '.join(removed.failed)}), and the task "
            "stays: another program may have them open. Close it, and try again.",
            headers={"Retry-After": str(RETRY_SECONDS)},
        )
    return removed


def _answer(data: object) -> web.Response:
    return web.json_response({"success": True, "status": 200, "data": data})


def _session(row: SessionRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "status": state_of(row),
        "expires_at": iso_time(row.expires_at),
        "created_at": iso_time(row.created_at),
        "idle_timeout": row.idle_seconds,
        "call_count": row.calls,
    }


async def _json_body(request: web.Request) -> Any:
    """The JSON body of a request, of limited size and within a time."""
    try:
        body = await within(BODY_SECONDS, _body(request.content))
    except TimeoutError:
        raise Problem(408, f"the body was not there within {BODY_SECONDS} s") from None
    try:
        data = json.loads(body, parse_constant=_no_number)
        # Fails on half a surrogate pair, and on 1e999, which Python reads as infinity.
        json.dumps(data, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    return data


async def _body(content: StreamReader) -> bytes:
    body = b""
    async for chunk in content.iter_any():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise Problem(413, f"the body has more than {MAX_BODY_BYTES} bytes; upload files by POST /files")
    return body


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")
