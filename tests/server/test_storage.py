"""The server's own disk and database: full, locked, older, newer, damaged."""

import errno
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import requests
from helpers_server import APP, serve, wait_until
from PIL import Image
from sqlalchemy import create_engine
from wan21.server import schema, store
from wan21.server.store import Base


def database_of(host):
    return host.data_directory / "jobs.sqlite"


@pytest.fixture
def locked(host, monkeypatch):
    """The API, while another program writes to its database."""
    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    with serve(host) as api:
        yield api


def test_a_locked_database_asks_to_try_again(locked, host, job):
    body = {"app": APP, "input": locked.client.run(job(), wait=False)["input"]}
    with closing(sqlite3.connect(database_of(host))) as other:
        other.execute("BEGIN EXCLUSIVE")
        for answer in (
            requests.post(f"{locked.url}/apps/run", json=body),
            requests.post(f"{locked.url}/files", json={"files": [{"size": 5}]}),
        ):
            assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
            assert "database is locked" in answer.json()["detail"] and "SELECT" not in answer.text
    assert requests.post(f"{locked.url}/apps/run", json=body).ok and len(host.queue) == 2
    assert len(list(host.input_directory.rglob("*.png"))) == 2


def test_who_asks_for_a_task_does_not_wait_for_who_writes(host, job, monkeypatch):
    monkeypatch.setattr(store, "LOCK_SECONDS", 60)
    with serve(host) as api, ThreadPoolExecutor(1) as others:
        done = api.client.run(job(), wait=False)["id"]
        api.play_next()
        wait_until(lambda: api.client.get_task(done).data["status"] == 10)
        with closing(sqlite3.connect(database_of(host))) as other:
            other.execute("BEGIN IMMEDIATE")
            writes = others.submit(requests.post, f"{api.url}/files", json={"files": [{"size": 5}]})
            answers = [requests.get(f"{api.url}/tasks/{done}", timeout=30).json() for _ in range(50)]
            assert all(one["data"]["status"] == 10 for one in answers) and not writes.done()
        assert writes.result().ok


def test_a_cancel_that_meets_a_lock_is_carried_out_later(locked, host, job):
    waiting = locked.client.run(job(), wait=False)["id"]
    with closing(sqlite3.connect(database_of(host))) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = requests.post(f"{locked.url}/tasks/{waiting}/cancel")
        assert answer.status_code == 503 and not host.queue
    wait_until(lambda: locked.client.get_task(waiting).data["status"] == 12)
    assert locked.client.get_task(waiting).data["error"] == ""


def test_an_upload_that_meets_a_lock_at_its_end_is_there(host, job, monkeypatch):
    """Its URL is used up by then: a 503 had asked for what a 404 answers."""
    data = Path(job()["input"]["image"]).read_bytes()

    async def claim_and_lock(self, *args):
        row = await real(self, *args)
        other.execute("BEGIN EXCLUSIVE")
        return row

    monkeypatch.setattr(store, "LOCK_SECONDS", 0.2)
    real = store.Store.claim_upload
    with serve(host) as api:
        with closing(sqlite3.connect(database_of(host), check_same_thread=False)) as other:
            monkeypatch.setattr(store.Store, "claim_upload", claim_and_lock)
            link, cut = (
                requests.post(f"{api.url}/files", json={"files": [{"size": len(data)}]}).json()["data"][0]
                for _ in range(2)
            )
            assert requests.put(link["upload_url"], data=data).status_code == 204
            other.rollback()
            assert requests.put(cut["upload_url"], data=data + b"x").status_code == 413
            other.rollback()
        assert requests.post(f"{api.url}/apps/run", json=job(image=link["uri"])).ok


def test_a_full_disk_is_not_the_pictures_fault(api, host, job, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    body = {"app": APP, "input": api.client.run(job(), wait=False)["input"]}
    monkeypatch.setattr(Image.Image, "save", full)
    answer = requests.post(f"{api.url}/apps/run", json=body)
    assert answer.status_code == 507 and int(answer.headers["Retry-After"]) > 0
    assert "disk is full" in answer.json()["detail"] and len(host.queue) == 1
    monkeypatch.undo()
    assert requests.post(f"{api.url}/apps/run", json=body).ok


def test_a_full_database_is_507_and_nothing_stays(host, job, monkeypatch):
    with serve(host) as api:
        body = {"app": APP, "input": api.client.run(job(), wait=False)["input"]}
    real = store._on_connect

    def small(connection, record):
        real(connection, record)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")

    monkeypatch.setattr(store, "_on_connect", small)
    with serve(host) as api:
        answers = [requests.post(f"{api.url}/apps/run", json=body) for _ in range(12)]
        refused = [answer for answer in answers if not answer.ok]
        assert refused and all(a.status_code == 507 and a.headers["Retry-After"] for a in refused)
        assert len(list(host.input_directory.rglob("*.png"))) == 1 + len(answers) - len(refused)


def version_of(path):
    with closing(sqlite3.connect(path)) as database:
        return database.execute("PRAGMA user_version").fetchone()[0]


def test_an_older_database_is_brought_up_to_date(host, job):
    with serve(host) as api:
        over, waiting = (api.client.run(job(), wait=False)["id"] for _ in range(2))
        api.client.cancel(over)
    assert version_of(database_of(host)) == schema.VERSION
    with closing(sqlite3.connect(database_of(host))) as database, database:
        database.execute("UPDATE files SET expires_at = NULL WHERE role = 'input'")
        for name in ("placement", "tries"):
            database.execute(f"ALTER TABLE tasks DROP COLUMN {name}")
        database.execute("PRAGMA user_version = 0")
    with serve(host) as api:
        assert api.client.get_task(over).data["status"] == 12
        wait_until(lambda: api.client.get_task(waiting).data["status"] == 2)
    with closing(sqlite3.connect(database_of(host))) as database:
        ends = dict(database.execute("SELECT task_id, expires_at FROM files WHERE role = 'input'"))
    assert ends[over] > 0 and ends[waiting] is None and version_of(database_of(host)) == schema.VERSION


def test_a_step_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "jobs.sqlite"
    engine = create_engine(f"sqlite:///{path}")
    schema.bring_up_to_date(engine, Base.metadata, path)

    def half(connection):
        connection.exec_driver_sql("ALTER TABLE files ADD COLUMN new TEXT")
        raise ValueError("stopped here")

    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    monkeypatch.setitem(schema._STEPS, schema.VERSION - 1, half)
    with pytest.raises(ValueError, match="stopped here"):
        schema.bring_up_to_date(engine, Base.metadata, path)
    with closing(sqlite3.connect(path)) as database:
        assert "new" not in [row[1] for row in database.execute("PRAGMA table_info(files)")]
    assert version_of(path) == schema.VERSION - 1
    engine.dispose()


@pytest.mark.parametrize("case", ["newer", "fewer columns", "damaged", "no database"])
def test_a_database_that_is_not_read_is_named_with_what_to_do(host, case):
    with serve(host):
        pass
    path = database_of(host)
    if case in ("newer", "fewer columns"):
        with closing(sqlite3.connect(path)) as database, database:
            newer = f"PRAGMA user_version = {schema.VERSION + 1}"
            database.execute(newer if case == "newer" else "ALTER TABLE tasks DROP COLUMN progress")
    else:
        for other in path.parent.glob("jobs.sqlite-*"):
            other.unlink()
        whole = path.read_bytes()
        path.write_bytes(
            b"hello" * 99 if case == "no database" else whole[:4096] + b"\xff" * len(whole[4096:])
        )
    before = path.read_bytes()
    with serve(host) as api:
        answer = requests.get(f"{api.url}/sessions")
        assert answer.status_code == 503
        detail = answer.json()["detail"]
        assert str(path) in detail and "move the file away" in detail and "http" not in detail
    assert path.read_bytes()[100:] == before[100:]
