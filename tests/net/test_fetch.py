"""Downloads from a local server, kind and hostile: 127.0.0.1 plays a public address, 127.0.0.2 a private."""

import hashlib
import http.server
import socket
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from wan21.net import fetch as f
from wan21.net import links
from wan21.wan.files import read_checkpoint
from wan21.wan.files.kinds import LORA, not_a
from wan21.wan.refusal import Refusal

BODY = bytes(range(256)) * 1200  # 300 KB


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        self.server.answer(self)


def send(request, body=BODY, status=200, length=None, **headers):
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    if length is not False:
        request.send_header("Content-Length", str(len(body) if length is None else length))
    request.send_header("Connection", "close")
    request.end_headers()
    request.wfile.write(body)
    request.close_connection = True


@pytest.fixture
def server(monkeypatch):
    """A server on 127.0.0.1; `answer` is what it does with a request."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer = [], send
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(links, "PUBLIC_SCHEMES", ("https", "http"))
    real = links.is_public
    monkeypatch.setattr(links, "is_public", lambda ip: ip == "127.0.0.1" or real(ip))
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url, folder, check=lambda path: None, **options):
    return f.fetch(url, folder, ".safetensors", check, **options)


def test_fetched_once_with_progress_and_named_as_the_server_names_it(server, tmp_path):
    seen = []
    path = fetch(
        f"{server.url}/a/style%20one.safetensors?token=x", tmp_path, progress=lambda *p: seen.append(p)
    )
    assert path.read_bytes() == BODY
    assert path.name.startswith("style one-") and path.name.endswith(".safetensors")
    assert seen[-1] == (len(BODY), len(BODY)) and seen == sorted(seen)
    assert fetch(f"{server.url}/a/style%20one.safetensors?token=x", tmp_path) == path
    assert len(server.asked) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_one_process_fetches_a_file_at_a_time_and_a_cancel_ends_the_wait(server, tmp_path, monkeypatch):
    monkeypatch.setattr(f, "WAIT_SECONDS", 0.01)
    url = f"{server.url}/style.safetensors"
    folder = tmp_path / "loras"
    part = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:12]}.part"
    with f._alone(part, lambda *_: None):  # as of another process: a lock of its own

        def cancel(done, total):
            raise InterruptedError

        with pytest.raises(InterruptedError):
            fetch(url, folder, progress=cancel)
        assert server.asked == []
    assert fetch(url, folder).read_bytes() == BODY


def test_redirects_as_hubs_make_them(server, tmp_path):
    def answer(request):
        if request.path.startswith("/api/download/models/7"):
            return send(request, b"", 307, Location="/signed/blob?X-Signature=abc%2Fd")
        return send(request, Content_Disposition='attachment; filename="Cat (v2).safetensors"')

    server.answer = answer
    path = fetch(f"{server.url}/api/download/models/7?type=Model", tmp_path)
    assert path.name.startswith("Cat (v2)-") and path.read_bytes() == BODY
    assert server.asked[1][0] == "/signed/blob?X-Signature=abc%2Fd"
    assert server.asked[1][1]["Host"] == server.url.removeprefix("http://")


def test_never_takes_the_place_of_another_file(server, tmp_path):
    other = tmp_path / "style.safetensors"
    other.write_bytes(b"mine")
    first = fetch(f"{server.url}/1/style.safetensors", tmp_path)
    second = fetch(f"{server.url}/2/style.safetensors", tmp_path)
    assert len({other, first, second}) == 3 and other.read_bytes() == b"mine"


class Cancelled(Exception):
    pass


def cancel_after(count):
    def progress(done, total):
        if done >= count:
            raise Cancelled

    return progress


@pytest.mark.parametrize("case", ["continues", "has changed", "knows no ranges"])
def test_a_cancelled_download_goes_on(server, tmp_path, case):
    changed = BODY[::-1]

    def answer(request):
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        if start and case == "continues" and request.headers["If-Range"] == '"v1"':
            span = f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
            return send(request, BODY[start:], 206, Content_Range=span, ETag='"v1"')
        return send(request, changed if start and case == "has changed" else BODY, ETag='"v1"')

    server.answer = answer
    url = f"{server.url}/big.safetensors"
    with pytest.raises(Cancelled):
        fetch(url, tmp_path, progress=cancel_after(1))
    begun = next(tmp_path.glob(".*.part")).stat().st_size
    assert begun > 0 and not list(tmp_path.glob("*.safetensors"))
    path = fetch(url, tmp_path)
    assert path.read_bytes() == (changed if case == "has changed" else BODY)
    assert server.asked[1][1]["Range"] == f"bytes={begun}-"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_without_a_promise_of_equal_bytes_it_starts_over(server, tmp_path):
    url = f"{server.url}/big.safetensors"
    with pytest.raises(Cancelled):
        fetch(url, tmp_path, progress=cancel_after(1))
    assert fetch(url, tmp_path).read_bytes() == BODY
    assert "Range" not in server.asked[1][1]


def test_a_broken_connection_is_said_and_kept(server, tmp_path):
    server.answer = lambda request: send(request, BODY[:1000], length=len(BODY), ETag='"v"')
    with pytest.raises(ValueError, match=r"127\.0\.0\.1/big\.safetensors could not be read .* Try again"):
        fetch(f"{server.url}/big.safetensors?token=secret", tmp_path)
    assert next(tmp_path.glob(".*.part")).stat().st_size == 1000


REFUSED_LINKS = [
    ("https://127.0.0.2/x.safetensors", "127.0.0.2, a private or local address"),
    ("https://[::1]/x.safetensors", "::1, a private"),
    ("https://[::ffff:10.0.0.1]/x.safetensors", "a private"),
    ("https://169.254.169.254/latest/meta-data", "a private"),
    ("http://example.com/x.safetensors", "must be an https link"),
    ("file:///etc/passwd", "must be an https link"),
    ("ftp://example.com/x.safetensors", "must be an https link"),
    ("https://user:pw@example.com/x.safetensors", "without a user name"),
    ("x.safetensors", "must be an https link"),
    ("https://example.com:99999/x", "cannot be read"),
    ("https://exam ple.com/x.safetensors", "'exam ple.com' is no name of a server"),
    ("https://.example.com/x.safetensors", "the link cannot be read"),
    (f"https://{'a' * 64}.example.com/x.safetensors", "the link cannot be read"),
]


@pytest.mark.parametrize("url, message", REFUSED_LINKS)
def test_links_that_are_refused_before_anything_is_sent(url, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fetch(url, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url, message", REFUSED_LINKS)
def test_a_refusal_is_two_sentences(url, message):
    with pytest.raises(Refusal, match=message) as raised:
        links.check_link(url)
    assert str(raised.value) == f"{raised.value.problem}. {raised.value.fix}."
    assert not any(text.endswith(".") for text in (raised.value.problem, raised.value.fix))


@pytest.mark.parametrize("limit", ["lots", "nan", "inf", "2,5"])
def test_a_limit_that_is_no_number_is_refused_before_anything_is_sent(limit, server, tmp_path, monkeypatch):
    monkeypatch.setenv("WAN21_MAX_DOWNLOAD_GB", limit)
    with pytest.raises(Refusal, match=f"WAN21_MAX_DOWNLOAD_GB is '{limit}'; it must be a number"):
        fetch(f"{server.url}/x.safetensors", tmp_path)
    assert not server.asked


def test_a_name_in_other_letters_is_sent_as_the_network_knows_it():
    assert links.check_link("https://B\u00fccher.example/\u00e4.png")[1::2] == (
        "xn--bcher-kva.example",
        "/%C3%A4.png",
    )
    with pytest.raises(ValueError, match="cannot be read"):
        links.check_link("https://" + "\u00fc" * 70 + ".example/")


PRIVATE = (
    "10.1.2.3", "172.16.0.1", "192.168.1.1", "127.0.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "::", "::1", "fe80::1%eth0", "fd00::1", "ff02::1", "::ffff:127.0.0.1",
    "::127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1", "2002:7f00:1::", "2001:0:0:0:0:0:80ff:fffe",
    "fec0::1", "3fff:abc::1", "64:ff9b:1::a00:1",
)  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_in_every_form(address):
    assert not links.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert links.is_public(address)


@pytest.mark.parametrize(
    "place",
    [
        "http://127.0.0.2:{port}/x.safetensors",
        "http://localhost2:{port}/",
        "file:///etc/passwd",
        "gopher://x",
    ],
)
def test_a_redirect_to_a_private_place(server, tmp_path, place, monkeypatch):
    real = socket.getaddrinfo
    names = {"localhost2": "127.0.0.3"}
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real(names.get(host, host), *a, **k))
    server.answer = lambda request: send(request, b"", 302, Location=place.format(port=server.server_port))
    with pytest.raises(ValueError, match=r"a private or local address|must be an https or http link"):
        fetch(f"{server.url}/x.safetensors", tmp_path)
    assert len(server.asked) == 1 and list(tmp_path.iterdir()) == []


def test_a_name_that_changes_its_address_is_asked_once(server, tmp_path, monkeypatch):
    """DNS rebinding: public when checked, private when asked again."""
    real, answers = socket.getaddrinfo, iter(["127.0.0.1", "127.0.0.2"])
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda h, *a, **k: real(next(answers) if h == "rebind.test" else h, *a, **k)
    )
    path = fetch(f"http://rebind.test:{server.server_port}/x.safetensors", tmp_path)
    assert path.read_bytes() == BODY
    assert next(answers) == "127.0.0.2"
    assert server.asked[0][1]["Host"] == f"rebind.test:{server.server_port}"


def test_one_private_address_among_public_ones_is_enough(tmp_path, monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 443)) for ip in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: both)
    with pytest.raises(ValueError, match=r"mixed\.test is at 10\.0\.0\.1"):
        fetch("https://mixed.test/x.safetensors", tmp_path)


@pytest.mark.parametrize("place", ["https://[x", "//a]b/", "https://..example/", "https://a:1e9/"])
def test_a_redirect_that_cannot_be_read(server, tmp_path, place):
    server.answer = lambda request: send(request, b"", 302, Location=place)
    with pytest.raises(Refusal, match=r"cannot be read \(.*\)\. Copy"):
        fetch(f"{server.url}/x.safetensors?token=secret", tmp_path)


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_a_size_of_any_number_of_digits(server, tmp_path, digits):
    """Python had failed on it in words of its own."""
    server.answer = lambda request: send(request, BODY, length="9" * digits)
    with pytest.raises(Refusal, match=r"is \d+\.\d\d GB; at most|sends more than") as error:
        fetch(f"{server.url}/x.safetensors", tmp_path / "none", lambda _: None, max_bytes=10)
    assert len(str(error.value)) < 300


def test_endless_redirects(server, tmp_path):
    server.answer = lambda request: send(request, b"", 302, Location=request.path + "x")
    with pytest.raises(ValueError, match="redirects more than 5 times"):
        fetch(f"{server.url}/x", tmp_path)
    assert len(server.asked) == 6


def test_an_endless_body(server, tmp_path):
    def answer(request):
        send(request, b"", length=False)
        try:
            while True:
                request.wfile.write(bytes(1 << 16))
        except OSError:
            pass

    server.answer = answer
    with pytest.raises(ValueError, match=r"sends more than the 0\.00 GB"):
        fetch(f"{server.url}/x.safetensors", tmp_path, max_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_a_size_past_the_limit_is_not_read(server, tmp_path, monkeypatch):
    server.answer = lambda request: send(request, b"", length=3_000_000_000)
    monkeypatch.setenv("WAN21_MAX_DOWNLOAD_GB", "2")
    with pytest.raises(ValueError, match=r"is 3\.00 GB; at most 2\.00 GB"):
        fetch(f"{server.url}/x.safetensors", tmp_path)
    monkeypatch.setenv("WAN21_MAX_DOWNLOAD_GB", "lots")
    with pytest.raises(ValueError, match="WAN21_MAX_DOWNLOAD_GB is 'lots'"):
        fetch(f"{server.url}/x.safetensors", tmp_path)


def test_wrong_content_is_refused_by_its_head_and_by_the_whole(server, tmp_path):
    def refuse(thing):
        raise ValueError("no model")

    for checks in ({"check_head": refuse}, {"check": refuse}):
        with pytest.raises(ValueError, match="no model"):
            fetch(f"{server.url}/x.safetensors", tmp_path, **checks)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no list of what is mapped")
def test_a_refused_file_is_no_longer_mapped_when_it_is_deleted(server, tmp_path, monkeypatch):
    """As on Windows, which deletes no mapped file."""
    unlink = Path.unlink

    def unlink_on_windows(path, missing_ok=False):
        if str(path) in Path("/proc/self/maps").read_text():
            raise PermissionError(13, "The process cannot access the file", str(path))
        unlink(path, missing_ok)

    def check(path):
        state_dict = read_checkpoint(path).state_dict
        assert str(path) in Path("/proc/self/maps").read_text()
        try:
            raise not_a(LORA, state_dict)
        except Refusal as error:  # as the nodes put a file's name in front
            raise error.about("the file behind lora_url") from error

    monkeypatch.setattr(Path, "unlink", unlink_on_windows)
    body = safetensors.torch.save({"weight": torch.zeros(1 << 16)})
    server.answer = lambda request: send(request, body, ETag='"1"')
    with pytest.raises(Refusal, match="lora_url"):
        fetch(f"{server.url}/x.safetensors", tmp_path, check)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "disposition, stem",
    [
        ('attachment; filename="../../evil.safetensors"', "evil"),
        (r'attachment; filename="..\..\evil.safetensors"', "evil"),
        ("attachment; filename=/etc/evil.safetensors", "evil"),
        ("attachment; filename*=UTF-8''..%2F..%2Fevil.safetensors", "evil"),
        ("attachment; filename*=UTF-8''caf%C3%A9.safetensors; filename=x.safetensors", "café"),
        ('attachment; filename="a:b*c?.safetensors"', "a_b_c_"),
        ('attachment; filename=".safetensors"', "download"),
        ('attachment; filename="..safetensors"', "download"),
        ('attachment; filename="%s.safetensors"' % ("n" * 400), "n" * 120),
        ("attachment; filename*=UTF-8''%s.safetensors" % ("%E5%AD%97" * 90), "字" * 40),
        ('attachment; filename="page.html"', "link"),
    ],
)
def test_a_name_never_leaves_the_folder(server, tmp_path, disposition, stem):
    server.answer = lambda request: send(request, Content_Disposition=disposition.encode().decode("latin-1"))
    folder = tmp_path / "loras"
    path = fetch(f"{server.url}/%2e%2e%2flink.safetensors", folder)
    assert path.parent == folder and path.name.rpartition("-")[0] == stem
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            lambda r: send(r, Content_Type="text/html"),
            r"leads to 'page' \(text/html\), not to a \.safetensors file",
        ),
        (lambda r: send(r, status=404), "answers 404"),
        (lambda r: send(r, status=401), "needs a login"),
        (lambda r: send(r, status=500), "answers 500"),
    ],
)
def test_answers_that_are_no_file(server, tmp_path, answer, message):
    server.answer = answer
    with pytest.raises(ValueError, match=message) as error:
        fetch(f"{server.url}/page?token=secret", tmp_path)
    assert "secret" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_small_body_at_once(server):
    url = f"{server.url}/a.png"
    assert f.fetch_bytes(url, len(BODY), 10) == BODY
    with pytest.raises(ValueError, match=r"127\.0\.0\.1/a\.png has more than 0\.31 MB"):
        f.fetch_bytes(url + "?token=secret", len(BODY) - 1, 10)
    with pytest.raises(ValueError, match="a private or local address"):
        f.fetch_bytes("https://127.0.0.2/a.png", 10, 10)


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips_is_cut_off(server, part):
    def answer(request):
        if part == "body":
            send(request, b"", length=False)
        try:
            while not stop.wait(0.02):
                request.wfile.write(b"x")
        except OSError:
            pass

    server.answer, stop = answer, threading.Event()
    begin = time.monotonic()
    with pytest.raises(ValueError, match="took too long"):
        f.fetch_bytes(f"{server.url}/a.png", 1_000_000, 0.3)
    stop.set()
    assert time.monotonic() - begin < 5


def test_headers_that_drip_do_not_hold_a_download(server, tmp_path, monkeypatch):
    def drip(request):
        while not stop.wait(0.02):
            request.wfile.write(b"x")

    monkeypatch.setattr(links, "HEAD_SECONDS", 0.3)
    server.answer, stop = drip, threading.Event()
    with pytest.raises(ValueError, match="took too long"):
        fetch(f"{server.url}/x.safetensors", tmp_path)
    stop.set()
    server.answer = slow_body  # which may take longer than the headers may
    assert fetch(f"{server.url}/x.safetensors", tmp_path).read_bytes() == BODY


def slow_body(request):
    send(request, BODY[:10], length=len(BODY))
    time.sleep(0.5)
    request.wfile.write(BODY[10:])


def test_the_owner_allows_private_addresses_or_turns_downloads_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(links, "PUBLIC_SCHEMES", ("https",))
    monkeypatch.setattr(links, "is_public", lambda ip: False)
    url = f"{server.url}/x.safetensors"
    with pytest.raises(ValueError, match="must be an https link"):
        fetch(url, tmp_path)
    monkeypatch.setenv("WAN21_ALLOW_PRIVATE_URLS", "1")
    assert fetch(url, tmp_path).read_bytes() == BODY
    monkeypatch.setenv("WAN21_NO_DOWNLOADS", "1")
    with pytest.raises(ValueError, match="downloads are turned off on this server"):
        fetch(url, tmp_path)


@pytest.mark.parametrize("short", [1, len(BODY) - 1, len(BODY) - 100_000])
def test_a_picture_that_is_cut_off_is_not_taken(server, short):
    server.answer = lambda request: send(request, BODY[: len(BODY) - short], length=len(BODY))
    with pytest.raises(Refusal, match=r"could not be read .*IncompleteRead"):
        f.fetch_bytes(server.url, len(BODY), 10)
    server.answer = send
    assert f.fetch_bytes(server.url, len(BODY), 10) == BODY
