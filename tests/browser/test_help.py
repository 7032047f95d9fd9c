"""Help pages beside the graph, in English and Chinese: all of a page stands within the narrow panel."""

import pytest
from lib.editor import CLASSIC, NODES_2, READY, SETTINGS
from lib.pack import ROOT

PAGES = ROOT / "web" / "docs"
NODES = sorted(path.stem for path in PAGES.glob("*.md"))
OPEN = """id => {
    app.graph.clear()
    const node = LiteGraph.createNode(id)
    app.graph.add(node)
    app.canvas.centerOnNode(node)
    app.canvas.selectNode(node)
}"""
# What does not fit: parts that scroll sideways (tables, code) or stand over the edge of the panel.
TOO_WIDE = """() => {
    const help = document.querySelector('.node-help-content')
    const edge = help.getBoundingClientRect().right + 1
    return [help, ...help.querySelectorAll('*')]
        .filter(part => part.scrollWidth > part.clientWidth + 1 && part.clientWidth > 0
            || part.getBoundingClientRect().right > edge)
        .map(part => `${part.tagName} ${part.innerText?.slice(0, 60)}`)
}"""
PICTURES_ARE_THERE = """() => [...document.querySelectorAll('.node-help-content img')]
    .every(image => image.complete && image.naturalWidth)"""


EDITORS = {"en": CLASSIC, "zh": CLASSIC, "en, nodes 2.0": NODES_2}


@pytest.fixture(scope="module", params=EDITORS)
def editor(request, page, server):
    """The editor in a language, and the language's code."""
    language = request.param.split(",")[0]
    server.client.post("/settings", EDITORS[request.param] | {"Comfy.Locale": language})
    page.reload()
    page.wait_for_function(READY)
    yield page, language
    server.client.post("/settings", SETTINGS | CLASSIC)
    page.reload()
    page.wait_for_function(READY)


def open_page(editor, node_id):
    """Selects a node alone and opens its help beside it."""
    page, language = editor
    file = PAGES / f"{node_id}.md" if language == "en" else PAGES / node_id / f"{language}.md"
    title = file.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    page.evaluate(OPEN, node_id)
    page.get_by_test_id("info-button").click()
    page.get_by_role("heading", name=title, level=1, exact=True).wait_for()
    page.wait_for_function(PICTURES_ARE_THERE)
    return page


@pytest.mark.parametrize("node_id", NODES)
def test_page_fits_the_panel(node_id, editor):
    page = open_page(editor, node_id)
    assert page.evaluate(TOO_WIDE) == []
    width = page.evaluate("() => document.querySelector('.node-help-content').clientWidth")
    assert width < 500, "a panel that is not narrow says nothing"


def test_a_wide_table_would_be_seen(editor):
    """What the pages had before: three columns, and long names that do not wrap."""
    page = open_page(editor, NODES[0])
    cells = "".join(f"<td><code>{name * 20}</code></td>" for name in ("input_", "value_", "meaning_"))
    page.evaluate(
        "html => document.querySelector('.markdown-content').insertAdjacentHTML('beforeend', html)",
        f"<table><tr>{cells}</tr></table>",
    )
    assert any(part.startswith("TABLE") for part in page.evaluate(TOO_WIDE))
