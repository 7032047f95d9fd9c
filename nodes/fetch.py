"""Downloads of links that people give: from public addresses only, bounded, resumable, checked before use.

A link is text from anyone who can queue a job, so it must not reach what only this machine can reach. Each
host name is resolved once, every address it has is checked, and the connection goes to a checked address,
so that a second answer of the name server cannot lead it elsewhere; redirects are followed by hand under the
same rule. Proxies of the environment are not used, since they would resolve the name again.

Settings of the server's owner, read at each call: WAN21_NO_DOWNLOADS=1 turns downloads off;
WAN21_ALLOW_PRIVATE_URLS=1 allows private and loopback addresses and plain http; WAN21_MAX_DOWNLOAD_GB (16)
bounds one file.
"""

import hashlib
import http.client
import ipaddress
import json
import os
import re
import shutil
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable
from pathlib import Path

MAX_REDIRECTS = 5
TIMEOUT_S = 30.0  # to connect, and for each piece of the body
PIECE_BYTES = 1 << 20
HEAD_BYTES = 1 << 16  # what `check_head` sees
MAX_NAME = 120
DEFAULT_MAX_GB = 16.0
PUBLIC_SCHEMES = ("https",)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
_LOCK = threading.Lock()  # one download at a time: two jobs with one link must not share a partial file

Progress = Callable[[int, int], None]


def fetch(
    url: str,
    folder: str | Path,
    suffix: str,
    check: Callable[[Path], None],
    check_head: Callable[[bytes], None] = lambda head: None,
    progress: Progress = lambda done, total: None,
    max_bytes: int | None = None,
) -> Path:
    """Bring the file behind a link into a folder, once.

    The file is named as the server names it, with a mark made from the link, so it never takes the place of
    another file and is found again without asking the server.

    Args:
        url: https link; its redirects may lead to other hosts.
        folder: where the file goes, and its partial file until it is whole and checked.
        suffix: that the server's name for the file must have, such as `.safetensors`.
        check: raises `ValueError` when the whole file is not what it should be; it is deleted then.
        check_head: the same for its first bytes, before the rest is read.
        progress: called with (bytes done, bytes in all or 0); may raise to cancel. A later call goes on
            from there.
        max_bytes: bound of the size; WAN21_MAX_DOWNLOAD_GB without it.

    Raises:
        ValueError: the link is not allowed, cannot be reached or is not what it should be; says which.
            Queries of links, where access tokens stand, are not repeated in it.
    """
    if os.environ.get("WAN21_NO_DOWNLOADS") == "1":
        raise ValueError(
            "downloads are turned off on this server (WAN21_NO_DOWNLOADS). Put the file into its folder"
        )
    url, folder = url.strip(), Path(folder)
    _split(url)
    mark = hashlib.sha256(url.encode()).hexdigest()[:12]
    with _LOCK:
        present = next(folder.glob(f"*-{mark}{suffix}"), None)
        if present is not None:
            return present
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f".{mark}.part"
        limit = _max_bytes() if max_bytes is None else max_bytes
        try:
            name = _download(url, part, suffix, check_head, progress, limit)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"{shown(url)} could not be read ({type(error).__name__}: {error}). Try again: what is there "
                "is kept"
            ) from error
        try:
            check(part)
        except ValueError:
            _forget(part)
            raise
        whole = folder / f"{name}-{mark}{suffix}"
        os.replace(part, whole)  # the mark is this link's own: nothing else can be there
        _forget(part)
        return whole


def shown(url: str) -> str:
    """A link as it may be shown: host and path, without the query, where tokens stand."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}{parts.path}"


def is_public(address: str) -> bool:
    """Whether an IP address can be reached from everywhere, in whatever form IPv6 wraps it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


# --- one request --------------------------------------------------------------------------------------


def _private_allowed():
    return os.environ.get("WAN21_ALLOW_PRIVATE_URLS") == "1"


def _max_bytes():
    text = os.environ.get("WAN21_MAX_DOWNLOAD_GB", "")
    try:
        return int(float(text or DEFAULT_MAX_GB) * 1e9)
    except ValueError as error:
        raise ValueError(f"WAN21_MAX_DOWNLOAD_GB is {text!r}; it must be a number of gigabytes") from error


def _split(url):
    """(scheme, host, port, target) of a link that is allowed by its form."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"the link cannot be read ({error}). Copy it again") from error
    schemes = (*PUBLIC_SCHEMES, "http") if _private_allowed() else PUBLIC_SCHEMES
    if parts.scheme not in schemes or not parts.hostname or parts.username is not None:
        raise ValueError(
            f"the link leads to {parts.scheme or 'no scheme'}://{parts.hostname or ''}; it must be an https "
            "link without a user name. Copy the download link of the file"
        )
    target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
    if parts.query:
        target += "?" + urllib.parse.quote(parts.query, safe="=&%/:?@!$'()*+,;~")
    return parts.scheme, parts.hostname, port or {"https": 443, "http": 80}[parts.scheme], target


def _addresses(host, port):
    """Addresses of a host, all of them checked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    private = [address for address in addresses if not is_public(address)]
    if private and not _private_allowed():
        raise ValueError(
            f"{host} is at {private[0]}, a private or local address, which links must not reach. Use a "
            "public link; the server's owner may set WAN21_ALLOW_PRIVATE_URLS=1"
        )
    return addresses


def _connect(scheme, host, port):
    """A connection to a checked address, with TLS for the name."""
    error = OSError(f"{host} has no address")
    for address in _addresses(host, port):
        try:
            sock = socket.create_connection((address, port), timeout=TIMEOUT_S)
        except OSError as failed:
            error = failed
            continue
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
        tls = ssl.create_default_context() if scheme == "https" else None
        connection.sock = tls.wrap_socket(sock, server_hostname=host) if tls else sock
        return connection
    raise error


def _open(url, headers):
    """The response behind a link after its redirects, and the last link."""
    for _ in range(MAX_REDIRECTS + 1):
        scheme, host, port, target = _split(url)
        connection = _connect(scheme, host, port)
        shown_port = "" if port == {"https": 443, "http": 80}[scheme] else f":{port}"
        own = {"Host": (f"[{host}]" if ":" in host else host) + shown_port, "Accept-Encoding": "identity"}
        connection.request("GET", target, headers=headers | own)
        response = connection.getresponse()
        if response.status not in (301, 302, 303, 307, 308):
            return connection, response, url
        place = response.getheader("Location", "")
        connection.close()
        url = urllib.parse.urljoin(url, place)
    raise ValueError(
        f"{shown(url)} redirects more than {MAX_REDIRECTS} times. Copy the link of the file itself"
    )


# --- the body -----------------------------------------------------------------------------------------


def _download(url, part, suffix, check_head, progress, limit):
    """Fill the partial file, from where it stands if the server can; the file's name, without suffix."""
    state = _state(part)
    done = part.stat().st_size if part.is_file() and state.get("etag") else 0
    headers = {"User-Agent": "wan21-i2v"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": state["etag"]}
    connection, response, last = _open(url, headers)
    try:
        if response.status == 416 and done == state.get("total"):  # everything is there already
            return state["name"]
        _check_status(response.status, url)
        if response.status != 206 or not _continues(response, done):
            done = 0
        name = _name(response, url, last, suffix)
        length = response.getheader("Content-Length")
        total = done + int(length) if length and length.isdecimal() else 0
        _check_room(total, done, limit, part, url)
        _remember(part, {"etag": _etag(response), "total": total, "name": name})
        try:
            _copy(response, part, done, total, check_head, progress, limit, url)
        except ValueError:
            _forget(part)
            raise
        return name
    finally:
        connection.close()


def _check_status(status, url):
    if status in (401, 403):
        raise ValueError(
            f"{shown(url)} needs a login ({status}). Use a link with an access token, or download the file "
            "in a browser"
        )
    if status not in (200, 206):
        raise ValueError(f"{shown(url)} answers {status}, not a file. Copy the download link again")


def _continues(response, done):
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.getheader("Content-Range", ""))
    return span is not None and int(span[1]) == done


def _etag(response):
    etag = response.getheader("ETag", "")
    return etag if etag.startswith('"') else ""  # a weak one does not promise equal bytes


def _check_room(total, done, limit, part, url):
    if total > limit:
        raise ValueError(
            f"{shown(url)} is {total / 1e9:.2f} GB; at most {limit / 1e9:.2f} GB are fetched. The server's "
            "owner may raise WAN21_MAX_DOWNLOAD_GB"
        )
    free = shutil.disk_usage(part.parent).free
    if total - done > free:
        raise ValueError(f"{shown(url)} needs {(total - done) / 1e9:.2f} GB and {free / 1e9:.2f} GB are free")


def _copy(response, part, done, total, check_head, progress, limit, url):
    head = b"" if done == 0 else None
    with part.open("r+b" if done else "wb") as file:
        file.seek(done)
        file.truncate()
        while piece := response.read1(PIECE_BYTES):
            done += len(piece)
            if done > limit:
                raise ValueError(
                    f"{shown(url)} sends more than the {limit / 1e9:.2f} GB that are fetched at most"
                )
            if head is not None:
                head += piece[: HEAD_BYTES - len(head)]
                if len(head) == HEAD_BYTES or done == total:
                    check_head(head)
                    head = None
            file.write(piece)
            progress(done, total)
    if total and done < total:
        raise http.client.IncompleteRead(b"", total - done)


# --- names and partial files --------------------------------------------------------------------------


def _name(response, url, last, suffix):
    """A harmless file name, without suffix, from the server's header or else from the link's path."""
    disposition = response.getheader("Content-Disposition", "")
    extended = re.search(r"filename\*\s*=\s*[\w-]*'[\w-]*'([^;]+)", disposition, re.IGNORECASE)
    plain = re.search(r'filename\s*=\s*(?:"([^"]*)"|([^;]+))', disposition, re.IGNORECASE)
    given = urllib.parse.unquote(extended[1]) if extended else (plain and (plain[1] or plain[2]))
    paths = [urllib.parse.unquote(urllib.parse.urlsplit(u).path) for u in (url, last)]
    names = [re.split(r"[/\\]", text.strip())[-1] for text in (given or "", *paths)]
    name = next((name for name in names if name.lower().endswith(suffix)), None)
    if name is None:
        kind = response.getheader("Content-Type", "of no stated type")
        raise ValueError(
            f"{shown(url)} leads to {next(filter(None, names), 'a page')!r} ({kind}), not to a {suffix} "
            "file. Copy the download link of the file itself"
        )
    stem = re.sub(r"[^\w.+ ()\[\]-]", "_", name[: -len(suffix)]).strip(". ")
    return stem[:MAX_NAME] or "download"


def _sidecar(part):
    return part.with_suffix(".json")


def _state(part):
    try:
        return json.loads(_sidecar(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _remember(part, state):
    _sidecar(part).write_text(json.dumps(state), encoding="utf-8")


def _forget(part):
    part.unlink(missing_ok=True)
    _sidecar(part).unlink(missing_ok=True)
