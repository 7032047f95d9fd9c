"""The real editor of a running ComfyUI, in a real Chromium, for tests and for making workflows.

with open_editor(server.url) as page:
    load_graph(page, graph)
    prompt = api_graph(page)
"""

import json
import shutil
from contextlib import contextmanager

from .comfy_client import ComfyClient

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: containers have no user namespaces. The rest keeps Chromium from calling home.
BROWSER_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
    "--no-first-run",
]
# A fresh user folder would open the template browser over the page.
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Locale": "en"}
NODES_2 = {"Comfy.VueNodes.Enabled": True}  # the renderer of new Desktop and Cloud installations
CLASSIC = {"Comfy.VueNodes.Enabled": False}
VIEWPORT = {"width": 1920, "height": 1080}
TIMEOUT_MS = 60_000  # of any wait for the page: only a failure takes so long, or a busy machine
# After the extensions' own set-up, which goes on after the graph is there.
READY = "window.app?.graph && window.app.extensionManager && !document.querySelector('.p-blockui-mask')"


def find_browser():
    """Return the path of an installed Chromium or Chrome, None if there is none."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def open_editor(url, watch=None, settings=CLASSIC):
    """Open the editor of the server at `url` and yield its page.

    Args:
        url: address of the server.
        watch: called with the page before it loads, to listen to what happens there.
        settings: of the editor's user.
    """
    from playwright.sync_api import sync_playwright

    browser_path = find_browser()
    if browser_path is None:
        raise RuntimeError(f"No browser: none of {', '.join(BROWSERS)} is installed.")
    ComfyClient(url).post("/settings", SETTINGS | settings)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=BROWSER_ARGS)
        try:
            with open_tab(browser, url, watch) as page:
                yield page
        finally:
            browser.close()


@contextmanager
def open_tab(browser, url, watch=None):
    """Open the editor in a further page of a running browser, without what its other pages hold."""
    page = browser.new_page(viewport=VIEWPORT)
    try:
        page.set_default_timeout(TIMEOUT_MS)
        if watch is not None:
            watch(page)
        page.goto(url)
        page.wait_for_function(READY)
        yield page
    finally:
        page.close()


def load_graph(page, graph, name=None):
    """Load a graph in the editor's own format, into a tab of that name."""
    page.evaluate("([graph, name]) => app.loadGraphData(graph, true, true, name)", [graph, name])


def load_api_graph(page, graph, name):
    """Load a graph in API format, as dropping the file onto the canvas does."""
    page.evaluate("([graph, name]) => app.loadApiJson(graph, name)", [graph, name])


def api_graph(page):
    """Return the open graph in API format, as the editor would queue it."""
    return json.loads(page.evaluate("async () => JSON.stringify((await app.graphToPrompt()).output)"))


def editor_graph(page):
    """Return the open graph in the editor's own format."""
    return json.loads(page.evaluate("() => JSON.stringify(app.graph.serialize())"))
