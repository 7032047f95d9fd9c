"""One page of the running server's editor in a real Chromium."""

import pytest
from lib.editor import BROWSERS, find_browser, open_editor
from lib.pack import comfyui_path


@pytest.fixture(scope="module")
def complaints():
    """What the page complains about, as text; grows while it is used."""
    return []


# Not for the session: while Playwright runs, other tests could not call asyncio.run.
@pytest.fixture(scope="module")
def page(server, complaints):
    if find_browser() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    server.client.upload_image(comfyui_path() / "input" / "example.png")

    def watch(page):
        page.on("pageerror", lambda error: complaints.append(f"{error}\n{error.stack}"))
        page.on("console", lambda message: complaints.extend(_complaint(message)))

    with open_editor(server.url, watch) as page:
        yield page


def _complaint(message):
    url = message.location.get("url", "")
    translated = url.endswith("/en.md")  # asked for before the help page itself
    if message.type == "error" and not translated:
        yield f"{message.text} ({url})"
