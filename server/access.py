"""Who may call: keys or loopback, and how often."""

import hashlib
import hmac
import ipaddress
import math
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from aiohttp import web

from .problems import Problem
from .settings import Settings

LOCAL = "local"  # owner of everything while no keys are configured


class Gate:
    """Names the owner of a request, or refuses it.

    An owner's name is a digest of the key, so that the database holds no key.
    """

    def __init__(self, settings: Settings):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in settings.keys]
        self._operators = [hashlib.sha256(key.encode()).digest() for key in settings.operator_keys]

    def owner(self, request: web.BaseRequest) -> str:
        """The owner of a request.

        Raises:
            Problem: 401 without a known key; 403 for other than loopback clients when there are no keys.
        """
        if self._digests:
            return _matching(request, self._digests).hex()[:32]
        if not is_local(request):
            raise Problem(403, "No API keys are configured, so only clients on this machine are served.")
        return LOCAL

    def check_operator(self, request: web.BaseRequest) -> None:
        """Lets operators pass.

        Raises:
            Problem: 401 without a known key; 403 for the key of a client, for any key where there are none
                of operators, and for other than loopback clients when there are no keys at all.
        """
        if self._operators:
            given = _matching(request, [*self._operators, *self._digests])
            if given not in self._operators:
                raise Problem(403, "This key is a client's; one of WAN21_OPERATOR_KEYS is needed.")
            return
        self.owner(request)
        if self._digests:
            raise Problem(403, "No key may see this: none is set in WAN21_OPERATOR_KEYS.")


def _matching(request: web.BaseRequest, digests: Sequence[bytes]) -> bytes:
    """The digest of a request's key, which is one of these.

    Raises:
        Problem: 401.
    """
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    given = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
    matches = [hmac.compare_digest(given, digest) for digest in digests]  # all, in constant time
    if scheme.lower() != "bearer" or not any(matches):
        raise Problem(401, "A valid API key is needed.", headers={"WWW-Authenticate": "Bearer"})
    return given


def is_local(request: web.BaseRequest) -> bool:
    """Whether a request comes from this machine, neither through a proxy nor from a web page elsewhere.

    The peer's address alone is not enough: a browser also sends it for a foreign name that resolves to
    127.0.0.1 (so `Host` must be local), and for any page when ComfyUI runs with --enable-cors-header (so
    `Origin` must be local). A proxy on this machine that adds no header passes as a local client.
    """
    proxied = any(name in request.headers for name in ("Forwarded", "X-Forwarded-For", "X-Real-IP"))
    origin = request.headers.get("Origin")
    called = _host_of(f"//{request.host}")
    names = [called] if origin is None else [called, _host_of(origin)]
    local = all(name == "localhost" or _is_loopback(name) for name in names)
    return not proxied and local and _is_loopback(request.remote)


def _host_of(url: str) -> str | None:
    """The name in a URL, None where it or its port cannot be read."""
    try:
        parts = urlsplit(url)
        return parts.hostname if parts.port is None or parts.port else None
    except ValueError:
        return None


def _is_loopback(address: str | None) -> bool:
    try:
        parsed = ipaddress.ip_address(address or "")
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


class RateLimit:
    """A token bucket per owner, refilled evenly over a minute."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._capacity = per_minute
        self._per_second = per_minute / 60
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # owner -> (tokens, when)

    def take(self, owner: str) -> None:
        """Takes one token.

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
