"""Who may call: keys or loopback, and how often."""

import hashlib
import hmac
import ipaddress
import math
import time
from urllib.parse import urlsplit

from .problems import Problem

LOCAL = "local"  # owner of everything while no keys are configured


class Gate:
    """Names the owner of a request, or refuses it.

    Owners are named by a digest of their key, so that the database holds no key.
    """

    def __init__(self, settings):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.keys]

    def owner(self, request):
        """Return the owner of a request.

        Raises:
            Problem: 401 without a known key; 403 for other than loopback clients when there are no keys.
        """
        if self._digests:
            return self._key_owner(request.headers.get("Authorization", ""))
        if not _is_local(request):
            raise Problem(403, "No API keys are configured, so only clients on this machine are served.")
        return LOCAL

    def _key_owner(self, header):
        scheme, _, key = header.partition(" ")
        given = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all, in constant time
        if scheme.lower() != "bearer" or not any(matches):
            raise Problem(401, "A valid API key is needed.", headers={"WWW-Authenticate": "Bearer"})
        return given.hex()[:32]


def _is_local(request):
    """Whether a request comes from this machine, not through a proxy nor from a web page elsewhere.

    A name that an attacker points at 127.0.0.1 would pass by its peer alone, hence the look at `Host`; and
    with the host's --enable-cors-header any page may send requests, hence the look at `Origin`. A proxy that
    adds no header of its own cannot be told from a client on this machine.
    """
    proxied = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP"))
    origin = request.headers.get("Origin")
    names = [request.url.host] if origin is None else [request.url.host, _host_of(origin)]
    local = all(name == "localhost" or _is_loopback(name) for name in names)
    return not proxied and local and _is_loopback(request.remote)


def _host_of(origin):
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


def _is_loopback(address):
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


class RateLimit:
    """A bucket of tokens per owner, refilled evenly over a minute."""

    def __init__(self, per_minute, clock=time.monotonic):
        self._capacity = per_minute
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets = {}  # owner -> (tokens, when)

    def take(self, owner):
        """Use one token.

        Raises:
            Problem: 429 with Retry-After in whole seconds.
        """
        now = self._clock()
        tokens, then = self._buckets.get(owner, (self._capacity, now))
        tokens = min(self._capacity, tokens + (now - then) * self._per_second)
        if tokens < 1:
            wait = math.ceil((1 - tokens) / self._per_second)
            raise Problem(
                429, f"Too many requests; try again in {wait} s.", headers={"Retry-After": str(wait)}
            )
        self._buckets[owner] = (tokens - 1, now)
