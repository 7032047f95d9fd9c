"""Keys, loopback and limits."""

import pytest
from aiohttp.test_utils import make_mocked_request
from wan21.server.access import LOCAL, Gate, RateLimit
from wan21.server.problems import Problem
from wan21.server.settings import Settings

KEY, OTHER = "k" * 32, "o" * 32


def request(peer="127.0.0.1", host="127.0.0.1:8188", **headers):
    class Transport:
        def get_extra_info(self, name, default=None):
            return (peer, 5000) if name == "peername" else default

    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("GET", "/tasks/x", headers=headers | {"Host": host}, transport=Transport())


def test_without_keys_only_this_machine_is_served():
    gate = Gate(Settings())
    assert gate.owner(request()) == LOCAL
    assert gate.owner(request("::1", "localhost")) == LOCAL
    assert gate.owner(request(Origin="http://localhost:8188")) == LOCAL
    for refused in (
        request("192.168.1.7", "192.168.1.5"),
        request(host="evil.example"),  # a name that points at 127.0.0.1
        *(request(host=f"localhost:{port}") for port in ("x", "-1", "999999", "80:80")),  # had been a 500
        request(host="[::1"),
        request(X_Forwarded_For="8.8.8.8"),
        request(Origin="https://evil.example"),  # a page elsewhere, on a host that allows every origin
        request(Origin="null"),
        request(Origin="http://[evil"),
    ):
        with pytest.raises(Problem) as raised:
            gate.owner(refused)
        assert raised.value.status == 403


def test_keys_name_owners_and_others_are_refused():
    gate = Gate(Settings(keys=(KEY, OTHER)))
    owners = {
        gate.owner(request("8.8.8.8", "x.example", Authorization=f"Bearer {key}")) for key in (KEY, OTHER)
    }
    assert len(owners) == 2 and not any(key in owner for owner in owners for key in (KEY, OTHER))
    for header in ("", "Bearer", f"Bearer {KEY[:-1]}", f"Basic {KEY}", f"Bearer {KEY}x"):
        with pytest.raises(Problem) as raised:
            gate.owner(request(Authorization=header))
        assert raised.value.status == 401 and raised.value.headers["WWW-Authenticate"] == "Bearer"


def test_rate_limit_refills_and_says_when():
    now = [0.0]
    limit = RateLimit(2, clock=lambda: now[0])
    limit.take("a"), limit.take("a"), limit.take("b")
    with pytest.raises(Problem) as raised:
        limit.take("a")
    assert raised.value.status == 429 and raised.value.headers["Retry-After"] == "30"
    now[0] = 30.0
    limit.take("a")


def test_settings_of_the_environment(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}\n\n{OTHER}\n")
    environ = {"WAN21_API_KEYS": KEY, "WAN21_API_KEYS_FILE": str(path), "WAN21_MAX_UPLOAD_MB": "3"}
    settings = Settings.from_environment(environ)
    assert settings.keys == (KEY, OTHER) and settings.max_upload_bytes == 3 * 2**20
    assert KEY not in repr(settings)
    for wrong in (
        {"WAN21_API_KEYS": "short"},
        {"WAN21_API_KEYS": " , "},
        {"WAN21_API_KEYS_FILE": str(tmp_path / "none")},
        {"WAN21_MAX_UNFINISHED": "0"},
    ):
        with pytest.raises(ValueError):
            Settings.from_environment(wrong)
