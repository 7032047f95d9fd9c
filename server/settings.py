"""Settings of the job API, all from the environment; none is needed.

What links may do is set by three more variables, which `net/settings.py` reads at each use:
WAN21_ALLOW_PRIVATE_URLS, WAN21_NO_DOWNLOADS and WAN21_MAX_DOWNLOAD_GB.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

MIN_KEY_LENGTH = 16  # characters
SECRETS = ("WAN21_API_KEYS", "WAN21_API_KEYS_FILE", "WAN21_OPERATOR_KEYS", "WAN21_WEBHOOK_SECRET")


@dataclass(frozen=True)
class Settings:
    """Limits and secrets.

    Attributes:
        keys: API keys; without any, only loopback clients are served.
        public_url: base of the URLs handed out, such as `https://video.example.com/wan21`; None uses the
            address of each request.
        webhook_secret: key of the HMAC-SHA256 signature on webhooks; None sends them unsigned.
        requests_per_minute: runs and uploads of one key that may begin.
        max_unfinished: tasks of one key that may wait or run at a time.
        max_upload_bytes: largest file.
        max_stored_bytes: all uploads of one key at a time.
        upload_seconds: life of an upload URL.
        keep_uploads_seconds: life of an uploaded file.
        webhook_delays: seconds before each further attempt to deliver a webhook.
        operator_keys: keys that may see stations and figures, and nothing else.
        stations: of a fleet (0: as many as there is room for); None runs jobs in this ComfyUI.
        ray_address: of a cluster for them; None starts one on this machine.
        gpus_per_job: of each station; None is one where there are any.
        hung_seconds: without a sign of life, after which a station is given up.
    """

    keys: tuple[str, ...] = field(default=(), repr=False)
    public_url: str | None = None
    webhook_secret: str | None = field(default=None, repr=False)
    requests_per_minute: int = 120
    max_unfinished: int = 256
    max_upload_bytes: int = 64 * 2**20
    max_stored_bytes: int = 2 * 2**30
    upload_seconds: int = 900
    keep_uploads_seconds: int = 24 * 3600
    webhook_delays: tuple[float, ...] = (1, 5, 30, 120, 600, 1800, 7200)
    operator_keys: tuple[str, ...] = field(default=(), repr=False)
    stations: int | None = None
    ray_address: str | None = None
    gpus_per_job: int | None = None
    hung_seconds: int = 60

    def of_stations(self, environ: Mapping[str, str] = os.environ) -> dict[str, str | None]:
        """Variables of a station's ComfyUI; None takes one away.

        What links may do is the API's to say, and so is how many threads PyTorch has: Ray sets one.
        """
        kept = ("WAN21_ALLOW_PRIVATE_URLS", "WAN21_NO_DOWNLOADS", "WAN21_MAX_DOWNLOAD_GB", "OMP_NUM_THREADS")
        gone = ("WAN21_STATIONS", "WAN21_RAY_ADDRESS", *SECRETS)
        return {name: environ.get(name) for name in kept} | dict.fromkeys(gone) | {"WAN21_STATION": "1"}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """The settings in the `WAN21_*` variables.

        Raises:
            ValueError: a number is not one, a key is too short, or the keys file cannot be read.
        """
        defaults = cls()
        return cls(
            keys=_keys(environ),
            public_url=environ.get("WAN21_PUBLIC_URL", "").rstrip("/") or None,
            webhook_secret=environ.get("WAN21_WEBHOOK_SECRET") or None,
            requests_per_minute=_number(environ, "WAN21_REQUESTS_PER_MINUTE", defaults.requests_per_minute),
            max_unfinished=_number(environ, "WAN21_MAX_UNFINISHED", defaults.max_unfinished),
            max_upload_bytes=_number(environ, "WAN21_MAX_UPLOAD_MB", defaults.max_upload_bytes >> 20) << 20,
            max_stored_bytes=_number(environ, "WAN21_MAX_STORED_MB", defaults.max_stored_bytes >> 20) << 20,
            operator_keys=_checked_keys(environ.get("WAN21_OPERATOR_KEYS", "").split(",")),
            stations=_stations(environ),
            ray_address=environ.get("WAN21_RAY_ADDRESS") or None,
            gpus_per_job=_gpus_per_job(environ),
            hung_seconds=_number(environ, "WAN21_STATION_HUNG_SECONDS", defaults.hung_seconds),
        )


def _keys(environ: Mapping[str, str]) -> tuple[str, ...]:
    """The keys in WAN21_API_KEYS (separated by commas) and in the file WAN21_API_KEYS_FILE (one a line)."""
    text = environ.get("WAN21_API_KEYS", "").replace(",", "\n")
    path = environ.get("WAN21_API_KEYS_FILE")
    if path:
        try:
            text += "\n" + Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"WAN21_API_KEYS_FILE cannot be read: {error}") from error
    keys = _checked_keys(text.splitlines())
    if not keys and (environ.get("WAN21_API_KEYS") or path):
        raise ValueError("API keys are configured, and there is none among them")
    return keys


def _checked_keys(lines: Iterable[str]) -> tuple[str, ...]:
    stripped = [line.strip() for line in lines]
    keys = tuple(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))
    if any(len(key) < MIN_KEY_LENGTH for key in keys):
        raise ValueError(f"an API key has fewer than {MIN_KEY_LENGTH} characters; draw longer ones")
    return keys


def _stations(environ: Mapping[str, str]) -> int | None:
    text = environ.get("WAN21_STATIONS")
    if text and text != "auto" and not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"WAN21_STATIONS is {text!r}; set a whole number of 1 or more, or auto")
    return (0 if text == "auto" else int(text)) if text else None


def _gpus_per_job(environ: Mapping[str, str]) -> int | None:
    text = environ.get("WAN21_GPUS_PER_JOB")
    if text and not text.isdecimal():
        raise ValueError(f"WAN21_GPUS_PER_JOB is {text!r}; set a whole number, 0 for stations on the CPU")
    return int(text) if text else None


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name)
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} is {text!r}; set a whole number of 1 or more")
    return int(text)
