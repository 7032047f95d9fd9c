"""A real server with previews on, and one page of its editor in a real Chromium."""

import shutil

import pytest
from lib.editor import BROWSERS, find_browser, open_editor
from lib.host_server import HostServer
from lib.pack import comfyui_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if find_browser() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    base = tmp_path_factory.mktemp("host")
    with HostServer(base, extra_args=["--preview-method", "auto"]) as running:
        shutil.copy(comfyui_path() / "input" / "example.png", running.input_directory)
        yield running


@pytest.fixture(scope="module")
def complaints():
    """What the page complains about, as text; grows while it is used."""
    return []


# Not for the session: while Playwright runs, other tests could not call asyncio.run.
@pytest.fixture(scope="module")
def page(server, complaints):
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
