"""One page of the running server's editor in a real Chromium."""

import pytest
from lib.editor import BROWSERS, CLASSIC, NODES_2, find_browser, open_editor, open_tab
from lib.pack import comfyui_path


@pytest.fixture(scope="module")
def complaints():
    """What the page complains about, as text; grows while it is used."""
    return []


@pytest.fixture(scope="module")
def drawn_by():
    """The editor's renderer: "classic", that of local installations, or "nodes 2.0"."""
    return "classic"


@pytest.fixture(scope="module")
def watch(complaints):
    """Listens to a page."""

    def watch(page):
        page.on("pageerror", lambda error: complaints.append(f"{error}\n{error.stack}"))
        page.on("console", lambda message: complaints.extend(_complaint(message)))

    return watch


# Not for the session: while Playwright runs, other tests could not call asyncio.run.
@pytest.fixture(scope="module")
def page(server, watch, drawn_by):
    if find_browser() is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    server.client.upload_image(comfyui_path() / "input" / "example.png")
    with open_editor(server.url, watch, CLASSIC if drawn_by == "classic" else NODES_2) as page:
        yield page


@pytest.fixture
def tab(page, server, watch):
    """A page of one test alone: no graph, dialog or panel of another test lies on it."""
    with open_tab(page.context.browser, server.url, watch) as tab:
        yield tab


def _complaint(message):
    url = message.location.get("url", "")
    translated = url.endswith("/en.md")  # asked for before the help page itself
    if message.type == "error" and not translated:
        yield f"{message.text} ({url})"
