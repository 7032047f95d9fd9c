"""Tasks, files and sessions in SQLite, written by one thread in the order of the calls, read by another.

Rows are plain classes, used on the event loop as well: `Store` copies, it never hands out rows that are
attached to a database session.
"""

import asyncio
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    JSON,
    ColumnElement,
    Executable,
    Insert,
    case,
    create_engine,
    delete,
    event,
    func,
    or_,
    select,
    update,
)
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from .schema import bring_up_to_date

RECEIVE_SECONDS = 3600  # limit of the transfer of one upload
LOCK_SECONDS = 3  # that another program may hold the database; the client waits 30 s for an answer
LEAST_BYTES = 64 * 1024  # that a file counts as: a key could else have any number of small ones
T = TypeVar("T")


class Base(MappedAsDataclass, DeclarativeBase):
    """A row. Times are seconds since 1970."""


class TaskRow(Base):
    """One job.

    Attributes:
        prompt_id: the host's name for it.
        base_url: address under which the client reached this API, for the URLs it gets.
        graph: the API graph, kept to queue the job again after a restart.
        roles: what nodes of the graph do, see `graph.JobGraph`.
        hook_state: "none", "pending", "delivered" or "failed".
        placement: stations of a fleet that may run it; None is any.
        tries: times that it was given to a station of a fleet.
    """

    __tablename__ = "tasks"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    prompt_id: Mapped[str] = mapped_column(unique=True)
    status: Mapped[int] = mapped_column(index=True)
    app: Mapped[str]
    base_url: Mapped[str]
    input: Mapped[dict] = mapped_column(JSON)
    graph: Mapped[dict] = mapped_column(JSON)
    roles: Mapped[dict] = mapped_column(JSON)
    created_at: Mapped[float] = mapped_column(index=True)
    updated_at: Mapped[float]
    output: Mapped[dict | None] = mapped_column(JSON, default=None)
    error: Mapped[str] = mapped_column(default="")
    logs: Mapped[list] = mapped_column(JSON, default_factory=list)
    progress: Mapped[float] = mapped_column(default=0.0)
    session_id: Mapped[str | None] = mapped_column(default=None)
    meta: Mapped[dict | None] = mapped_column(JSON, default=None)
    webhook: Mapped[str | None] = mapped_column(default=None)
    hook_state: Mapped[str] = mapped_column(default="none", index=True)
    hook_attempts: Mapped[int] = mapped_column(default=0)
    hook_next: Mapped[float] = mapped_column(default=0.0)
    hook_error: Mapped[str] = mapped_column(default="")
    placement: Mapped[list | None] = mapped_column(JSON, default=None)
    tries: Mapped[int] = mapped_column(default=0)


class FileRow(Base):
    """One file.

    Attributes:
        role: "upload" (not used by a task yet), "arriving" (of a task that is not stored yet), "input" or
            "output".
        path: on disk.
        token: secret part of the upload URL; None once the file is there.
        expires_at: when it is removed: an upload, a picture whose task is over; None for other files.
    """

    __tablename__ = "files"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    role: Mapped[str]
    filename: Mapped[str | None]
    content_type: Mapped[str]
    size: Mapped[int]
    path: Mapped[str]
    created_at: Mapped[float]
    task_id: Mapped[str | None] = mapped_column(index=True, default=None)
    token: Mapped[str | None] = mapped_column(index=True, default=None)
    expires_at: Mapped[float | None] = mapped_column(default=None)


class SessionRow(Base):
    """A session of the client: a name that its runs share."""

    __tablename__ = "sessions"
    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(index=True)
    idle_seconds: Mapped[int]
    created_at: Mapped[float]
    expires_at: Mapped[float]
    calls: Mapped[int] = mapped_column(default=0)
    ended: Mapped[bool] = mapped_column(default=False)


Row = TaskRow | FileRow | SessionRow
R = TypeVar("R", TaskRow, FileRow, SessionRow)


class Store:
    """Asynchronous access to the database file at `path`, which is created.

    A method returns when its change is committed: a killed process does not lose it.
    """

    def __init__(self, path: Path):
        self._path = path
        wait = {"check_same_thread": False, "timeout": LOCK_SECONDS}
        self._engine = create_engine(f"sqlite:///{path}", connect_args=wait)
        event.listen(self._engine, "connect", _on_connect)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan21-store")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wan21-reader")

    async def _run(self, work: Callable[[Session], T], thread: ThreadPoolExecutor | None = None) -> T:
        def in_session() -> T:
            with Session(self._engine, expire_on_commit=False) as session, session.begin():
                return work(session)

        return await asyncio.get_running_loop().run_in_executor(thread or self._thread, in_session)

    async def open(self) -> None:
        """Creates the tables, or brings those of an older version up to date.

        Raises:
            RuntimeError: the database is of a newer version.
            DatabaseError: it is damaged, or held by another program.
        """
        run = asyncio.get_running_loop().run_in_executor
        await run(self._thread, bring_up_to_date, self._engine, Base.metadata, self._path)

    def explain(self, error: DatabaseError) -> str:
        """Why the database cannot be used, and what to do."""
        if isinstance(error, OperationalError):
            fix = "end the program that holds it, or make room, and start ComfyUI again"
        else:
            fix = "move the file away to begin anew"
        return f"{self._path} cannot be read ({error.orig}); {fix}"

    def close(self) -> None:
        """Finishes what was asked for and closes the file."""
        self._thread.shutdown()
        self._reader.shutdown()
        self._engine.dispose()

    async def add(self, *rows: Row) -> None:
        """Inserts copies of rows."""
        inserts = [_insert(row) for row in rows]

        def work(session: Session) -> None:
            for one in inserts:
                session.execute(one)

        await self._run(work)

    async def save(self, row: Row, *names: str) -> None:
        """Writes the named columns of a row, as they are now."""
        await self.write(row, {name: getattr(row, name) for name in names})

    async def write(self, row: Row, values: dict[str, Any]) -> None:
        """Writes new values of columns; the row in memory stays as it is."""
        await self._write(row, values)

    async def _write(
        self, row: Row, values: dict[str, Any], new_rows: Sequence[Row] = (), *more: Executable
    ) -> None:
        statement = update(type(row)).where(type(row).id == row.id).values(**values)
        inserts = [_insert(new) for new in new_rows]

        def work(session: Session) -> None:
            for one in (*inserts, statement, *more):
                session.execute(one)

        await self._run(work)

    def save_at_exit(self, row: Row, *names: str) -> None:
        """`save`, for the end of a process that has neither an event loop nor further threads. Blocking."""
        values = {name: getattr(row, name) for name in names}
        with Session(self._engine) as session, session.begin():
            session.execute(update(type(row)).where(type(row).id == row.id).values(**values))

    async def get(self, kind: type[R], row_id: str) -> R | None:
        """One row by its id, as it was last committed: who asks does not wait for the disk of who writes."""
        return await self._run(lambda session: session.get(kind, row_id), self._reader)

    async def select(
        self, kind: type[R], *conditions: ColumnElement[bool], order: Any = None, limit: int | None = None
    ) -> Sequence[R]:
        """The rows of a kind that fulfil all conditions."""
        statement = select(kind).where(*conditions).order_by(order).limit(limit)
        return await self._run(lambda session: list(session.scalars(statement)))

    async def delete(self, row: Row) -> None:
        """Removes one row."""
        await self._run(lambda session: session.execute(delete(type(row)).where(type(row).id == row.id)))

    async def claim_upload(self, token: str, now: float) -> FileRow | None:
        """The announced upload with this token, which is used up then; None without one."""

        def work(session: Session) -> FileRow | None:
            row = session.scalar(select(FileRow).where(FileRow.token == token, FileRow.expires_at > now))
            if row is not None:
                row.token, row.expires_at = None, now + RECEIVE_SECONDS
            return row

        return await self._run(work)

    async def add_task(self, row: TaskRow) -> None:
        """Inserts a copy of a task, whose pictures have arrived with that."""
        insert = _insert(row)
        pictures = (FileRow.task_id == row.id, FileRow.role == "arriving")
        arrived = update(FileRow).where(*pictures).values(role="input", expires_at=None)

        def work(session: Session) -> None:
            session.execute(insert)
            session.execute(arrived)

        await self._run(work)

    async def end_task(
        self, row: TaskRow, values: dict[str, Any], outputs: Sequence[FileRow], keep_until: float
    ) -> None:
        """Writes the end of a task: columns of its row, what it wrote, and when its pictures go."""
        expire = update(FileRow).where(FileRow.task_id == row.id, FileRow.role == "input")
        await self._write(row, values, outputs, expire.values(expires_at=keep_until))

    async def room_taken(self, owner: str, now: float) -> tuple[int, float | None]:
        """What one owner's uploads, announced or received, and pictures of tasks take that have not expired.

        Summed in the database: one owner may have some ten thousand.

        Returns:
            Bytes, each file as `LEAST_BYTES` or more; when the first of them goes, None where none does.
        """
        least = case((FileRow.size < LEAST_BYTES, LEAST_BYTES), else_=FileRow.size)
        ends = case((FileRow.size > 0, FileRow.expires_at))
        taken = select(func.coalesce(func.sum(least), 0), func.min(ends)).where(
            FileRow.owner == owner,
            FileRow.role.in_(("upload", "arriving", "input")),
            or_(FileRow.expires_at.is_(None), FileRow.expires_at > now),
        )
        total, end = await self._run(lambda session: session.execute(taken).one())
        return total, end

    async def due_webhooks(
        self, now: float, sending: Collection[str] = (), waiting: Collection[str] = ()
    ) -> Sequence[TaskRow]:
        """Tasks whose webhook is due, the longest due first; 20 at most.

        Args:
            sending: ids of tasks that are left out.
            waiting: owners that are left out.
        """
        return await self.select(
            TaskRow,
            TaskRow.hook_state == "pending",
            TaskRow.hook_next <= now,
            TaskRow.id.not_in(sending),
            TaskRow.owner.not_in(waiting),
            order=TaskRow.hook_next,
            limit=20,
        )

    async def stale_files(self, now: float) -> Sequence[FileRow]:
        """Files whose time is up."""
        return await self.select(FileRow, FileRow.expires_at <= now)


def _insert(row: Row) -> Insert:
    table = Base.metadata.tables[row.__tablename__]
    return table.insert().values({column.key: getattr(row, column.key) for column in table.columns})


def _on_connect(connection: Any, _: object) -> None:
    """Makes readers not wait for the writer, and a commit return after its bytes are on disk."""
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
