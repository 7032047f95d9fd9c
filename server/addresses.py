"""Which addresses may be contacted: public ones, on every hop, unless private ones are allowed."""

import errno
import ipaddress
import socket

import aiohttp
from aiohttp.abc import AbstractResolver
from yarl import URL


class ForbiddenUrl(ValueError):
    """A URL that must not be contacted; the message says why."""


def check_url(text, allow_private, schemes=("https",)):
    """Return `text` as a URL that may be contacted, as far as its text tells.

    A name is judged when it is resolved, by `guarded_connector`.

    Args:
        allow_private: let private addresses and plain http pass.
        schemes: that are accepted.

    Raises:
        ForbiddenUrl: a wrong scheme, no host, a user name in it, or a private address.
    """
    try:
        url = URL(text)
        port = url.port
    except (ValueError, TypeError) as error:
        raise ForbiddenUrl(f"not a URL: {error}") from error
    allowed = {*schemes, "http"} if allow_private else set(schemes)
    if url.scheme not in allowed or not url.host or port == 0:
        raise ForbiddenUrl(f"the URL must be complete and begin with {' or '.join(sorted(allowed))}://")
    if url.user or url.password:
        raise ForbiddenUrl("the URL must not carry a user name or password")
    if not allow_private:
        _check_literal(url.host)
    return url


def is_public(address):
    """Whether an IP address, as text, is a public unicast one, seen through IPv4-in-IPv6 forms too."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if parsed.version == 6:
        inner = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo or (None, None))[1]
        if inner is None and parsed in _NAT64:
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        parsed = inner or parsed
    return parsed.is_global and not parsed.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def _check_literal(host):
    """Refuse a host that is itself a private address, in any spelling the system would accept."""
    try:
        public = is_public(host)
    except ValueError:
        try:
            public = is_public(socket.inet_ntoa(socket.inet_aton(host)))  # 127.1, 0x7f000001
        except OSError:
            return  # a name
    if not public:
        raise ForbiddenUrl(f"{host} is a private address")


class _PublicResolver(AbstractResolver):
    """Resolves names to public addresses only; what was checked is what is connected to."""

    def __init__(self):
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(self, host, port=0, family=socket.AF_INET):
        found = await self._resolver.resolve(host, port, family)
        if not found or not all(is_public(entry["host"]) for entry in found):
            raise OSError(errno.EACCES, f"{host} is a private address")
        return found

    async def close(self):
        await self._resolver.close()


def guarded_session(allow_private, timeout_s):
    """Return an HTTP session that connects to public addresses only, unless private ones are allowed.

    It follows no redirects by itself when asked with `allow_redirects=False`, reads neither proxies nor
    passwords from the environment, and keeps no cookies.
    """
    resolver = aiohttp.ThreadedResolver() if allow_private else _PublicResolver()
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(resolver=resolver, use_dns_cache=False),
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )
