"""What may be contacted."""

import asyncio
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from wan21.server.addresses import ForbiddenUrl, check_url, guarded_session, is_public
from wan21.server.fetch import FetchError, fetch

PRIVATE = """
127.0.0.1 10.0.0.1 192.168.1.1 169.254.169.254 100.64.0.1 0.0.0.0 224.0.0.1
::1 fe80::1%eth0 fc00::1 ::ffff:127.0.0.1 2002:7f00:1:: 64:ff9b::7f00:1
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_addresses(address):
    assert not is_public(address)


def test_public_addresses():
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1::1")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png",
        "file:///etc/passwd",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://0x7f000001/",
        "https://2130706433/",
        "https://[::1]/",
        "https://user:secret@example.com/",
        "https:///a",
        "nonsense",
    ],
)
def test_forbidden_urls(url):
    with pytest.raises(ForbiddenUrl):
        check_url(url, allow_private=False)


def test_allowed_urls():
    assert check_url("https://example.com/a.png", allow_private=False).host == "example.com"
    assert check_url("http://127.0.0.1:8000/a.png", allow_private=True).port == 8000


def test_a_name_that_resolves_to_a_private_address_is_not_contacted():
    async def get():
        async with guarded_session(False, 5) as session:
            await session.get("https://localhost:9/")

    with pytest.raises(OSError, match="private address"):
        asyncio.run(get())


@pytest.fixture
def web_server(monkeypatch):
    """A server on this machine with a picture, redirects and a body that is too long."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/to/"):
                self.send_response(302)
                self.send_header(
                    "Location", self.path[3:] if self.path != "/to/file" else "file:///etc/passwd"
                )
                self.end_headers()
                return
            if self.path == "/loop":
                self.send_response(302)
                self.send_header("Location", "/loop")
                self.end_headers()
                return
            self.send_response(404 if self.path == "/none" else 200)
            self.send_header("Content-Type", "text/html" if self.path == "/page" else "image/png")
            self.end_headers()
            self.wfile.write(b"x" * 1000)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


LIMITS = {"max_bytes": 1000, "accept": ("image/png",), "timeout_s": 10}


def test_fetch_follows_redirects_and_counts(web_server, tmp_path):
    said = []
    fetch(f"{web_server}/to/a", tmp_path / "a", progress=lambda *at: said.append(at), **LIMITS)
    assert (tmp_path / "a").read_bytes() == b"x" * 1000 and said[-1] == (1000, None)


@pytest.mark.parametrize(
    "path, options, message",
    [
        ("/none", {}, "404"),
        ("/page", {}, "text/html"),
        ("/loop", {}, "redirects"),
        ("/to/file", {}, "begin with"),
        ("/a", {"max_bytes": 999}, "larger than 999"),
    ],
)
def test_fetch_refuses_and_leaves_nothing(web_server, tmp_path, path, options, message):
    with pytest.raises(FetchError, match=message):
        fetch(web_server + path, tmp_path / "a", **(LIMITS | options))
    assert list(tmp_path.iterdir()) == []


def test_fetch_obeys_the_environment(web_server, tmp_path, monkeypatch):
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "0")
    with pytest.raises(FetchError, match="begin with https"):
        fetch(f"{web_server}/a", tmp_path / "a", **LIMITS)
    monkeypatch.setenv("WAN21_NO_DOWNLOADS", "1")
    with pytest.raises(FetchError, match="switched off"):
        fetch("https://example.com/a", tmp_path / "a", **LIMITS)
