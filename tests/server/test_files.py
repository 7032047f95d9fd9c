"""Uploads in all forms of the client, and what does not get through."""

import base64
import io
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import requests
from helpers_server import serve, wait_until
from inferencesh import APIError
from PIL import Image
from wan21.server import jobs
from wan21.server.files import Files


def png(size=(80, 64), **options):
    buffer = io.BytesIO()
    Image.new("RGB", size, "teal").save(buffer, "PNG", **options)
    return buffer.getvalue()


def announce(api, data, key="x"):
    request = {"files": [{"uri": "", "filename": "a.png", "content_type": "image/png", "size": len(data)}]}
    answer = requests.post(f"{api.url}/files", json=request, headers={"Authorization": f"Bearer {key}"})
    return answer.json()["data"][0] if answer.ok else answer


@pytest.mark.parametrize("form", ["path", "data", "base64"])
def test_the_forms_that_the_client_takes(api, job, image, form):
    text = base64.b64encode(png()).decode()
    given = {"path": image, "data": f"data:image/png;base64,{text}", "base64": text}[form]
    task = api.client.run(job(image=given), wait=False)
    with Image.open(api.host.input_directory / "wan21" / task["id"] / "image.png") as stored:
        assert stored.size == (80, 64)
    assert task["input"]["image"].startswith("wan21://files/")
    again = api.client.run(job(image=task["input"]["image"]), wait=False)
    assert again["id"] != task["id"]


@pytest.mark.parametrize("size, status", [(3.0, 200), (3.5, 422), (1e300, 413), (True, 422), ("3", 422)])
def test_sizes_are_whole_numbers_as_json_has_them(api, size, status):
    request = {"files": [{"uri": "", "filename": "a.bin", "content_type": "a/b", "size": size}]}
    answer = requests.post(f"{api.url}/files", json=request)
    assert answer.status_code == status
    if status == 200:
        assert requests.put(answer.json()["data"][0]["upload_url"], data=b"abc").ok


def test_texts_that_the_client_takes_for_base64_come_back(api, job):
    task = api.client.run(job(prompt="photorealistic42"), wait=False)
    assert task["input"]["prompt"] == "photorealistic42"
    with pytest.raises(APIError, match="is a file"):
        api.client.run(job(prompt=job()["input"]["image"]), wait=False)


@pytest.mark.parametrize("name", ["segments", "other"])
def test_one_uploaded_text_is_not_read_any_number_of_times(api, job, monkeypatch, name):
    """One of 64 KB, named 20,000 times in a body of 1 MB, had taken 1.7 GB."""
    link = announce(api, b"x" * 3000)
    assert requests.put(link["upload_url"], data=b"x" * 3000).ok
    read, real = [], Files.upload

    async def count(self, *args):
        read.append(args)
        return await real(self, *args)

    monkeypatch.setattr(Files, "upload", count)
    body = job(image="wan21://files/x", **{name: [link["uri"]] * 500})
    assert requests.post(f"{api.url}/apps/run", json=body).status_code == 422
    assert not read


@pytest.mark.parametrize(
    "value, message",
    [
        ("../../secret.png", "uploaded file or an https URL"),
        ("wan21://files/../../etc/passwd", "upload it again"),
        ("wan21://files/none", "upload it again"),
        ("https://127.0.0.1/a.png", "a private or local address"),
        ("https://127.1/a.png", "a private or local address"),
        ("https://localhost/a.png", "a private or local address"),
        ("http://example.com/a.png", "must be an https link"),
        ("file:///etc/passwd", "uploaded file or an https URL"),
    ],
)
def test_images_from_elsewhere_are_refused(api, job, value, message):
    with pytest.raises(APIError, match=message) as raised:
        api.client.run(job(image=value), wait=False)
    assert raised.value.status_code == 422 and "input.image" in raised.value.response_body


def test_what_is_no_picture_is_refused(api, job):
    text = base64.b64encode(b"no picture, only some words").decode()
    with pytest.raises(APIError, match="not a picture"):
        api.client.run(job(end_image=f"data:image/png;base64,{text}"), wait=False)
    assert api.host.queue == [] and not list(api.host.input_directory.rglob("*.png"))


def test_an_upload_url_works_once_for_the_announced_size(api):
    data = png()
    for sent, status in ((data[:-1], 400), (data + b"x", 413)):
        file = announce(api, data)
        assert requests.put(file["upload_url"], data=sent).status_code == status
        assert requests.put(file["upload_url"], data=data).status_code == 404
    file = announce(api, data)
    assert len(file["upload_url"].rpartition("/")[2]) == 43
    assert requests.put(file["upload_url"], data=data).ok
    assert requests.put(file["upload_url"], data=data).status_code == 404
    answer = requests.get(f"{api.url}/files/{file['id']}")
    assert answer.content == data and answer.headers["Content-Disposition"] == "attachment"
    assert requests.put(f"{api.url}/upload/..%2f..%2fx", data=b"x").status_code == 404


@pytest.fixture
def limited(host, monkeypatch):
    for name, value in {
        "WAN21_API_KEYS": "a" * 32 + "," + "b" * 32,
        "WAN21_MAX_UPLOAD_MB": "1",
        "WAN21_MAX_STORED_MB": "2",
        "WAN21_MAX_UNFINISHED": "2",
        "WAN21_REQUESTS_PER_MINUTE": "30",
    }.items():
        monkeypatch.setenv(name, value)
    with serve(host) as running:
        yield running


def test_sizes_are_limited_before_bytes_arrive(limited):
    assert announce(limited, b"x" * (2**20 + 1), "a" * 32).status_code == 413
    for _ in range(2):
        assert announce(limited, b"x" * 2**20, "a" * 32)["id"]
    refused = announce(limited, b"x", "a" * 32)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    assert announce(limited, b"x", "b" * 32)["id"]


def test_a_used_upload_goes_after_an_hour(api, job, image):
    api.client.run(job(image=image), wait=False)
    with sqlite3.connect(api.host.data_directory / "jobs.sqlite") as database:
        ((expires_at,),) = database.execute("SELECT expires_at FROM files WHERE role = 'upload'")
    assert 0 < expires_at - time.time() <= 3600


def test_a_picture_of_one_task_starts_another(api, job):
    first = api.client.run(job(), wait=False)["id"]
    [picture] = api.client.tasks.files(first).data
    second = api.client.run(job(image=picture["uri"]), wait=False)["id"]
    stored = [api.host.input_directory / "wan21" / task / "image.png" for task in (first, second)]
    assert stored[0].read_bytes() == stored[1].read_bytes()


def test_many_announcements_at_once_share_one_quota(limited):
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: announce(limited, b"x" * 2**20, "a" * 32), range(12)))
    assert sum(isinstance(answer, dict) for answer in answers) == 2


def test_a_job_whose_pictures_took_too_long_is_not_queued(api, job, monkeypatch):
    body = {"app": "infsh/wan2-1-i2v", "input": api.client.run(job(), wait=False)["input"]}
    monkeypatch.setattr(jobs, "REPLY_SECONDS", 0)
    answer = requests.post(f"{api.url}/apps/run", json=body)
    assert answer.status_code == 503 and int(answer.headers["Retry-After"]) > 0
    assert len(api.host.queue) == 1 and len(list(api.host.input_directory.rglob("image.png"))) == 1


@contextmanager
def web_server(content):
    """Address of a picture on a web server of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    server.server_close()


def test_a_picture_is_fetched_from_a_link(host, job, monkeypatch):
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    monkeypatch.setenv("WAN21_MAX_UPLOAD_MB", "1")
    with serve(host) as api:
        with web_server(png((70, 50))) as link:
            task = api.client.run(job(image=link), wait=False)
        folder = host.input_directory / "wan21" / task["id"]
        assert [path.name for path in folder.iterdir()] == ["image.png"]
        with Image.open(folder / "image.png") as stored:
            assert stored.size == (70, 50)
        for content, message in (
            (b"x" * (2**20 + 1), "has more than 1.05 MB"),
            (b"no picture", "not a picture"),
        ):
            with web_server(content) as link, pytest.raises(APIError, match=message):
                api.client.run(job(image=link), wait=False)
    assert len(host.queue) == 1 and len(list((host.input_directory / "wan21").rglob("*.*"))) == 1


def test_uploads_that_were_not_used_in_time_are_removed(host):
    with serve(host) as api:
        old, fresh = announce(api, png()), announce(api, png())
        for file in (old, fresh):
            assert requests.put(file["upload_url"], data=png()).ok
    uploads = host.data_directory / "uploads"
    assert len(list(uploads.iterdir())) == 2
    with sqlite3.connect(host.data_directory / "jobs.sqlite") as database:
        database.execute("UPDATE files SET expires_at = ? WHERE id = ?", (time.time() - 1, old["id"]))
    with serve(host) as api:
        wait_until(lambda: len(list(uploads.iterdir())) == 1)
        wait_until(lambda: requests.get(f"{api.url}/files/{old['id']}").status_code == 404)
        assert requests.get(f"{api.url}/files/{fresh['id']}").content == png()


def test_the_files_of_a_task_go_by_role_and_urls_have_the_public_base(host, job, monkeypatch):
    monkeypatch.setenv("WAN21_PUBLIC_URL", "https://video.example.com/wan21/")
    with serve(host) as api:
        file = announce(api, png())
        public, _, path = file["upload_url"].partition("/upload/")
        assert public == "https://video.example.com/wan21"
        assert requests.put(f"{api.url}/upload/{path}", data=png()).ok
        task = api.client.run(job(image=file["uri"]), wait=False)
        files = f"{api.url}/tasks/{task['id']}/files"
        assert requests.delete(files).status_code == 409
        api.play_next()
        wait_until(lambda: api.client.get_task(task["id"]).data["status"] == 10)
        output = api.client.get_task(task["id"]).data["output"]
        assert output["video"].startswith("https://video.example.com/wan21/files/")
        assert requests.delete(f"{files}?role=upload").status_code == 422
        kept = host.input_directory / "wan21" / task["id"] / "image.png"
        gone = requests.delete(f"{files}?role=output").json()["data"]
        assert len(gone["deleted"]) == 3 and not gone["skipped"] and kept.is_file()
        [left] = requests.get(files).json()["data"]
        assert left["role"] == "input"
        assert requests.delete(files).json()["data"]["deleted"] == [left["id"]] and not kept.exists()


def test_one_key_does_not_see_what_is_anothers(limited, job):
    first, second = limited.client_of("a" * 32), limited.client_of("b" * 32)
    task = first.run(job(), wait=False)
    other = {"Authorization": f"Bearer {'b' * 32}"}
    for method, path in (
        ("GET", ""), ("GET", "/stream"), ("GET", "/status"), ("GET", "/preview"), ("GET", "/files"),
        ("POST", "/cancel"), ("DELETE", ""), ("DELETE", "/files"),
    ):  # fmt: skip
        url = f"{limited.url}/tasks/{task['id']}{path}"
        assert requests.request(method, url, headers=other).status_code == 404, (method, path)
        assert requests.request(method, url).status_code == 401, (method, path)
    with pytest.raises(APIError, match="upload it again"):
        second.run(job(image=task["input"]["image"]), wait=False)
    file = first.tasks.files(task["id"]).data[0]
    assert requests.get(file["url"], headers=other).status_code == 404
    assert requests.get(file["url"]).status_code == 401
    assert requests.get(file["url"], headers={"Authorization": b"Bearer \xff"}).status_code == 401
    assert requests.get(f"{limited.url}/apps/infsh/wan2-1-i2v").status_code == 401
    assert first.get_task(task["id"]).data["status"] == 2


def test_queue_and_rate_are_limited_per_key(limited, job):
    first, second = limited.client_of("a" * 32), limited.client_of("b" * 32)
    given = first.run(job(), wait=False)["input"]
    first.run({"app": "infsh/wan2-1-i2v", "input": given}, wait=False)
    headers = {"Authorization": f"Bearer {'a' * 32}"}
    body = {"app": "infsh/wan2-1-i2v", "input": given}
    full = requests.post(f"{limited.url}/apps/run", json=body, headers=headers)
    assert full.status_code == 429 and int(full.headers["Retry-After"]) > 0 and "queue" in full.text
    second.run(job(), wait=False)
    answers = [requests.post(f"{limited.url}/apps/run", json=body, headers=headers) for _ in range(40)]
    assert any("Too many requests" in answer.text for answer in answers)
    assert all(answer.status_code == 429 and answer.headers["Retry-After"] for answer in answers)
