"""What one key may keep: uploads and pictures of tasks, until their time is up."""

import io
import os
import sqlite3
import time
from contextlib import closing

import pytest
import requests
from helpers_server import serve, wait_until
from lib.job_api import upload
from PIL import Image
from wan21.server import files

MB = 2**20


def noise(megabytes):
    """A PNG of about this size, which stays so when it is written again."""
    side = int((megabytes * MB / 3) ** 0.5)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)).save(buffer, "PNG")
    return buffer.getvalue()


def rows(host, columns="role, size, expires_at"):
    with closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database:
        return database.execute(f"SELECT {columns} FROM files ORDER BY created_at").fetchall()


def run(api, job, **fields):
    return requests.post(f"{api.url}/apps/run", json=job(**fields))


def bytes_below(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def small(host, monkeypatch):
    monkeypatch.setenv("WAN21_MAX_STORED_MB", "4")
    with serve(host) as running:
        yield running


def test_pictures_of_tasks_count_and_go_when_their_time_is_up(small, host, job):
    """One upload had been used for any number of pictures, which stayed for ever."""
    link = upload(small.url, noise(0.9), requests)
    answers = []
    while not answers or answers[-1].ok:
        answers.append(run(small, job, image=link))
        if answers[-1].ok:
            small.client.cancel(answers[-1].json()["data"]["id"])
        assert len(answers) < 9
    assert len(answers) == 4 and answers[-1].status_code == 429 and "4194304" in answers[-1].text
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 3600
    assert bytes_below(host.input_directory) <= 4 * MB
    ends = [end for role, _, end in rows(host) if role == "input"]
    assert len(ends) == 3 and all(0 < end - time.time() <= 3600 for end in ends)
    with closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database, database:
        database.execute("UPDATE files SET expires_at = 1 WHERE role = 'input'")
    assert run(small, job, image=link).ok
    [waiting] = [end for role, _, end in rows(host) if role == "input" and end != 1]
    assert waiting is None  # its task is not over


def test_expired_pictures_leave_the_disk(host, job):
    with serve(host) as api:
        for _ in range(2):
            task = api.client.run(job(), wait=False)
        api.client.cancel(task["id"])
        wait_until(lambda: api.client.get_task(task["id"]).data["status"] == 12)
    assert len(list(host.input_directory.rglob("*.png"))) == 2
    with closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database, database:
        database.execute("UPDATE files SET expires_at = 1 WHERE role = 'input' AND expires_at IS NOT NULL")
    with serve(host):
        wait_until(lambda: not (host.input_directory / "wan21" / task["id"]).exists())
    assert len(list(host.input_directory.rglob("*.png"))) == 1


def test_small_files_count_as_what_they_cost(small):
    """A key had had room for millions of one byte, all of them read anew at each request."""
    some = {"files": [{"size": 1}] * 16}
    answers = [requests.post(f"{small.url}/files", json=some) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 4 + [429]
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 900


def test_deleting_files_makes_room(small, job):
    link = upload(small.url, noise(1.5), requests)
    task = run(small, job, image=link).json()["data"]["id"]
    assert run(small, job, image=link).status_code == 429
    small.client.cancel(task)
    assert requests.delete(f"{small.url}/tasks/{task}?files=true").status_code == 204
    assert run(small, job, image=link).ok


def test_a_task_is_not_forgotten_before_its_files(api, host, job):
    task = api.client.run(job(), wait=False)["id"]
    api.client.cancel(task)
    picture = host.input_directory / "wan21" / task / "image.png"
    picture.unlink()
    picture.mkdir()  # which unlink cannot remove, like a file that is open on Windows
    for _ in range(2):
        answer = requests.delete(f"{api.url}/tasks/{task}?files=true")
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert requests.delete(f"{api.url}/tasks/{task}/files").status_code == 503
    picture.rmdir()
    assert requests.delete(f"{api.url}/tasks/{task}?files=true").status_code == 204
    assert requests.get(f"{api.url}/tasks/{task}").status_code == 404 and not picture.parent.exists()


def test_one_file_that_stays_does_not_keep_the_others(host, job):
    with serve(host) as api:
        tasks = [api.client.run(job(), wait=False)["id"] for _ in range(2)]
        for task in tasks:
            api.client.cancel(task)
            requests.delete(f"{api.url}/tasks/{task}")
    stuck, other = (host.input_directory / "wan21" / task / "image.png" for task in tasks)
    stuck.unlink()
    stuck.mkdir()
    with closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database, database:
        database.execute("UPDATE files SET expires_at = 1")
    with serve(host):
        wait_until(lambda: not other.parent.exists())
    assert stuck.exists() and [role for role, *_ in rows(host)] == ["input"]


def test_what_a_killed_process_was_busy_with_is_removed_at_the_start(host, job):
    with serve(host) as api:
        link = upload(api.url, noise(0.1), requests)
        kept = run(api, job, image=link).json()["data"]["id"]
        lost = run(api, job, image=link).json()["data"]["id"]
        announced = requests.post(
            f"{api.url}/files",
            json={"files": [{"filename": "a.png", "content_type": "image/png", "size": 9}]},
        ).json()["data"][0]
    with closing(sqlite3.connect(host.data_directory / "jobs.sqlite")) as database, database:
        database.execute("DELETE FROM tasks WHERE id = ?", (lost,))  # as if killed between picture and task
        database.execute("UPDATE files SET role = ? WHERE task_id = ?", (files.ARRIVING, lost))
    folder = host.input_directory / "wan21" / lost
    (folder / "image.fetched").write_bytes(b"x")
    uploads = host.data_directory / "uploads"
    (uploads / "0123.part").write_bytes(b"x")
    (uploads / "4567").write_bytes(b"x")
    (uploads / "89ab").mkdir()  # which unlink cannot remove, like a file that is open on Windows
    with serve(host) as api:
        assert not folder.exists() and len(list(uploads.iterdir())) == 2
        assert (host.input_directory / "wan21" / kept / "image.png").is_file()
        token = announced["upload_url"].rpartition("/")[2]
        assert requests.put(f"{api.url}/upload/{token}", data=b"123456789").ok
    assert sorted(role for role, *_ in rows(host)) == ["input", "upload", "upload"]
