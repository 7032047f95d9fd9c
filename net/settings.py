"""What the server's owner allows links to do, from the environment, read at each call.

| variable | |
|---|---|
| WAN21_ALLOW_PRIVATE_URLS=1 | links may lead to private and loopback addresses, and be plain http |
| WAN21_NO_DOWNLOADS=1 | nothing is downloaded |
| WAN21_MAX_DOWNLOAD_GB | the largest file that is downloaded, in gigabytes (16) |
"""

import os

from ..wan.refusal import Refusal

DEFAULT_MAX_GB = 16.0


def private_allowed() -> bool:
    """Whether links may lead to private addresses and be plain http."""
    return os.environ.get("WAN21_ALLOW_PRIVATE_URLS") == "1"


def downloads_allowed() -> bool:
    """Whether anything may be downloaded."""
    return os.environ.get("WAN21_NO_DOWNLOADS") != "1"


def max_download_bytes() -> int:
    """The size of the largest file that is downloaded.

    Raises:
        Refusal: the variable is not a number.
    """
    text = os.environ.get("WAN21_MAX_DOWNLOAD_GB", "")
    try:
        return int(float(text or DEFAULT_MAX_GB) * 1e9)
    except (ValueError, OverflowError) as error:  # the second for "inf"
        raise Refusal(
            f"WAN21_MAX_DOWNLOAD_GB is {text!r}; it must be a number of gigabytes",
            f"The server's owner may correct it, or leave it out for {DEFAULT_MAX_GB:g}",
        ) from error
