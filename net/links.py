"""Connections to links that people give: to public addresses only, under one rule for every use.

A link is text from anyone who can queue a job, so it must not reach what only this machine can reach. Each
host name is resolved once, every address it has is checked, and the connection goes to a checked address,
so that a second answer of the name server cannot lead it elsewhere; redirects are followed by hand under the
same rule. Proxies of the environment are not used, since they would resolve the name again.

WAN21_ALLOW_PRIVATE_URLS=1 of the server's owner allows private and loopback addresses and plain http; it is
read at each call.
"""

import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import threading
import time
import urllib.parse

MAX_REDIRECTS = 5
TIMEOUT_S = 30.0  # to connect, and for each piece of an answer
HEAD_SECONDS = 60.0  # to connect and until the headers of an answer are there, on each hop
PUBLIC_SCHEMES = ("https",)
PORTS = {"https": 443, "http": 80}
NAT64 = ipaddress.ip_network("64:ff9b::/96")


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
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_link(url: str) -> tuple[str, str, int, str]:
    """Read a link that is allowed by its form; the addresses of a name are judged when it is opened.

    Returns:
        (scheme, host, port, path and query).

    Raises:
        ValueError: it cannot be read, has another scheme, no host or a user name, or is a private address.
    """
    schemes = (*PUBLIC_SCHEMES, "http") if private_allowed() else PUBLIC_SCHEMES
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
        target = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~")
        query = urllib.parse.quote(parts.query, safe="=&%/:?@!$'()*+,;~")
        host = parts.hostname
        if host and not host.isascii():
            host = host.encode("idna").decode()
    except ValueError as error:
        raise ValueError(f"the link cannot be read ({error}). Copy it again") from error
    if parts.scheme not in schemes or not host or parts.username is not None:
        raise ValueError(
            f"the link leads to {parts.scheme or 'no scheme'}://{parts.hostname or ''}; it must be an "
            f"{' or '.join(schemes)} link without a user name. Copy it again"
        )
    _refuse_private(host, [host] if _is_address(host) else [])
    if query:
        target += "?" + query
    return parts.scheme, host, port or PORTS[parts.scheme], target


@contextlib.contextmanager
def open_link(url, headers, seconds, method="GET", body=None, redirects=MAX_REDIRECTS):
    """Send a request and yield its (response, last link) until the block ends.

    Args:
        url: the link.
        headers: of the request; `Host` and `Accept-Encoding` are set here.
        seconds: for all of it, the block included. Each piece has `TIMEOUT_S` and the headers have
            `HEAD_SECONDS` in any case.
        method: of the request.
        body: bytes to send.
        redirects: how many are followed; with 0 the response may be a redirect.

    Raises:
        ValueError: a link that is not allowed, or too many redirects.
        OSError, http.client.HTTPException: it could not be reached, or the time is over.
    """
    deadline = time.monotonic() + seconds
    for _ in range(redirects + 1):
        scheme, host, port, target = check_link(url)
        with _connection(scheme, host, port, deadline) as (connection, cut_at):
            shown_port = "" if port == PORTS[scheme] else f":{port}"
            own = {"Host": (f"[{host}]" if ":" in host else host) + shown_port, "Accept-Encoding": "identity"}
            connection.request(method, target, body, headers | own)
            response = connection.getresponse()
            cut_at(deadline)
            if not redirects or response.status not in (301, 302, 303, 307, 308):
                yield response, url
                return _check_time(deadline)
            url = urllib.parse.urljoin(url, response.getheader("Location", ""))
    raise ValueError(f"{shown(url)} redirects more than {redirects} times. Copy the link of the file itself")


def private_allowed() -> bool:
    """Whether the server's owner allows private addresses and plain http."""
    return os.environ.get("WAN21_ALLOW_PRIVATE_URLS") == "1"


@contextlib.contextmanager
def _connection(scheme, host, port, deadline):
    """A connection to a checked address, with TLS for the name, and `cut_at(time)`, when it is cut.

    At first that is when the headers are late, or at the deadline. A server that sends a byte now and then
    never runs into a timeout of the socket.
    """
    deadline = min(deadline, time.monotonic() + HEAD_SECONDS)
    sock = _connect(host, port, deadline)
    sock.settimeout(TIMEOUT_S)
    if scheme == "https":
        tls = ssl.create_default_context()
        sock = tls.wrap_socket(sock, server_hostname=host, do_handshake_on_connect=False)
    timer = None

    def cut_at(until):
        nonlocal timer, deadline
        deadline = until
        if timer is not None:
            timer.cancel()
        timer = threading.Timer(max(0.0, until - time.monotonic()), _cut, (sock,))
        timer.daemon = True
        timer.start()

    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.sock = sock
    cut_at(deadline)
    try:
        if scheme == "https":
            sock.do_handshake()
        yield connection, cut_at
    except (OSError, http.client.HTTPException):
        _check_time(deadline)  # what was cut is late, whatever it looks like here
        raise
    finally:
        timer.cancel()
        connection.close()


def _connect(host, port, deadline):
    """A socket to the first checked address that answers."""
    failed = OSError(f"{host} has no address")
    for address in _addresses(host, port):
        _check_time(deadline)
        try:
            return socket.create_connection((address, port), min(TIMEOUT_S, deadline - time.monotonic()))
        except OSError as error:
            failed = error
    raise failed


def _addresses(host, port):
    """Addresses of a host, all of them checked."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    _refuse_private(host, addresses)
    return addresses


def _refuse_private(host, addresses):
    private = [address for address in addresses if not is_public(address)]
    if private and not private_allowed():
        raise ValueError(
            f"{host} is at {private[0]}, a private or local address, which links must not reach. Use a "
            "public link; the server's owner may set WAN21_ALLOW_PRIVATE_URLS=1"
        )


def _is_address(host):
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _check_time(deadline):
    if time.monotonic() >= deadline:
        raise TimeoutError("it took too long")


def _cut(sock):
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # not TLS's own, which is not for other threads
