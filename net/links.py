"""Connections to links that people give: to public addresses only, under one rule for every use.

A link is text from anyone who can queue a job, so it must not reach what only this machine can reach. Each
host name is resolved once, every address it has is checked, and the connection goes to a checked address,
so that a second answer of the name server cannot lead it elsewhere; redirects are followed by hand under the
same rule. Proxies of the environment are not used, since they would resolve the name again. The server's
owner may allow private addresses and plain http (`settings`).
"""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ..wan.refusal import Refusal
from .settings import private_allowed

MAX_REDIRECTS = 5
TIMEOUT_S = 30.0  # for a connection, and for each piece of an answer
HEAD_SECONDS = 60.0  # on each hop, from the connection to the end of the answer's headers
PUBLIC_SCHEMES = ("https",)
PORTS = {"https": 443, "http": 80}
REDIRECTS = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")
DOCUMENTATION = ipaddress.ip_network("3fff::/20")  # of RFC 9637; Pythons of before 2025 take it for public


class Link(NamedTuple):
    """A link in its parts.

    Attributes:
        host: name in ASCII, or address without brackets.
        target: path and query.
    """

    scheme: str
    host: str
    port: int
    target: str


def shown(url: str) -> str:
    """The host and path of a link; its query may hold an access token and must not be shown."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.hostname}{parts.path}"


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from everywhere; IPv4 inside IPv6 is judged as IPv4."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local or ip in DOCUMENTATION:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_link(url: str) -> Link:
    """A link that is allowed by its form; the addresses of a host name are checked when it is opened.

    Raises:
        Refusal: it cannot be read, has another scheme, no host or a user name, or is a private address.
    """
    schemes = (*PUBLIC_SCHEMES, "http") if private_allowed() else PUBLIC_SCHEMES
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="=&%/:?@!$'()*+,;~")
        host = parts.hostname
        if host:  # an ASCII one too: names that are too long are found before the system asks for them
            host = host.encode("idna").decode()
        if host and not re.fullmatch(r"[\w.:%-]+", host, re.ASCII):
            raise ValueError(f"{host!r} is no name of a server")
    except ValueError as error:
        raise Refusal(f"the link cannot be read ({error})", "Copy it again") from error
    if parts.scheme not in schemes or not host or parts.username is not None:
        raise Refusal(
            f"the link leads to {parts.scheme or 'no scheme'}://{parts.hostname or ''}; it must be an "
            f"{' or '.join(schemes)} link without a user name",
            "Copy it again",
        )
    _refuse_private(host, [host] if _is_address(host) else [])
    if query:
        target += "?" + query
    return Link(parts.scheme, host, port or PORTS[parts.scheme], target)


@contextlib.contextmanager
def open_link(
    url: str,
    headers: Mapping[str, str],
    seconds: float,
    method: str = "GET",
    body: bytes | None = None,
    redirects: int = MAX_REDIRECTS,
) -> Iterator[tuple[http.client.HTTPResponse, str]]:
    """A context with the response to one request and the link it came from, after redirects.

    Args:
        url: link that `check_link` allows, as must be every link it redirects to.
        headers: further ones; `Host` and `Accept-Encoding` are set here.
        seconds: limit of the whole transfer, the block included; a piece (`TIMEOUT_S`) and the headers
            (`HEAD_SECONDS`) have limits of their own.
        body: of the request.
        redirects: how many are followed; with 0 a redirect is the response.

    Raises:
        Refusal: a link is not allowed, or there are too many redirects.
        OSError, http.client.HTTPException: the server could not be reached, or the time is over.
    """
    deadline = time.monotonic() + seconds
    for _ in range(redirects + 1):
        link = check_link(url)
        with _connection(link, deadline) as (connection, cut_at):
            own = {"Host": _host_header(link), "Accept-Encoding": "identity"}
            connection.request(method, link.target, body, {**headers, **own})
            response = connection.getresponse()
            cut_at(deadline)
            if not redirects or response.status not in REDIRECTS:
                yield response, url
                return _check_time(deadline)
            url = _joined(url, response.getheader("Location", ""))
    raise Refusal(f"{shown(url)} redirects more than {redirects} times", "Copy the link of the file itself")


def _joined(url: str, location: str) -> str:
    try:
        return urllib.parse.urljoin(url, location)
    except ValueError as error:
        raise Refusal(
            f"{shown(url)} redirects to a link that cannot be read ({error})",
            "Copy the link of the file itself",
        ) from error


def _host_header(link: Link) -> str:
    host = f"[{link.host}]" if ":" in link.host else link.host
    return host if link.port == PORTS[link.scheme] else f"{host}:{link.port}"


@contextlib.contextmanager
def _connection(
    link: Link, deadline: float
) -> Iterator[tuple[http.client.HTTPConnection, Callable[[float], None]]]:
    """A context with a connection to a checked address, TLS checked against the name, and `cut_at(time)`.

    A timer shuts the socket at that time: first when the headers are late, later when `cut_at` says. The
    timeout of the socket alone would never end a server that sends a byte now and then.
    """
    deadline = min(deadline, time.monotonic() + HEAD_SECONDS)
    sock = _connect(link.host, link.port, deadline)
    sock.settimeout(TIMEOUT_S)
    tls = None
    if link.scheme == "https":
        context = ssl.create_default_context()
        tls = sock = context.wrap_socket(sock, server_hostname=link.host, do_handshake_on_connect=False)
    timer = None

    def cut_at(until: float) -> None:
        nonlocal timer, deadline
        deadline = until
        if timer is not None:
            timer.cancel()
        timer = threading.Timer(max(0.0, until - time.monotonic()), _cut, (sock,))
        timer.daemon = True
        timer.start()

    connection = http.client.HTTPConnection(link.host, link.port, timeout=TIMEOUT_S)
    connection.sock = sock
    cut_at(deadline)
    try:
        if tls is not None:
            tls.do_handshake()
        yield connection, cut_at
    except (OSError, http.client.HTTPException):
        _check_time(deadline)  # a socket that the timer shut raises errors of many kinds
        raise
    finally:
        if timer is not None:
            timer.cancel()
        connection.close()


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """A socket to the first checked address that answers."""
    failed = OSError(f"{host} has no address")
    for address in _addresses(host, port):
        _check_time(deadline)
        try:
            return socket.create_connection((address, port), min(TIMEOUT_S, deadline - time.monotonic()))
        except OSError as error:
            failed = error
    raise failed


def _addresses(host: str, port: int) -> list[str]:
    """The addresses of a host, all of them checked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    _refuse_private(host, addresses)
    return addresses


def _refuse_private(host: str, addresses: list[str]) -> None:
    private = [address for address in addresses if not is_public(address)]
    if private and not private_allowed():
        raise Refusal(
            f"{host} is at {private[0]}, a private or local address, which links must not reach",
            "Use a public link; the server's owner may set WAN21_ALLOW_PRIVATE_URLS=1",
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_time(deadline: float) -> None:
    if time.monotonic() >= deadline:
        raise TimeoutError("it took too long")


def _cut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # `SSLSocket.shutdown` is not safe beside a reader
