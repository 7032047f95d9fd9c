"""The workflows and help pages in the real editor."""

import itertools
import json
import re

import pytest
from lib import bundled
from lib.editor import VIEWPORT, api_graph, load_graph
from lib.pack import LINK_NAME, ROOT
from lib.small_graphs import small_graph

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
EDITOR_ONLY = {"MarkdownNote", "Note"}  # not part of what is queued
TITLE_HEIGHT = 30
LATENT_FRAMES = 3

each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)

REGISTERED = "() => app.graph._nodes.map(node => [node.type, node.type in LiteGraph.registered_node_types])"
BOXES = "() => app.graph._nodes.map(node => [node.title, ...node.pos, ...node.size])"
SELECT = """id => {
    let node = app.graph._nodes.find(node => node.type === id)
    if (!node) app.graph.add(node = LiteGraph.createNode(id))  // one that this graph does not use
    app.canvas.centerOnNode(node)
    app.canvas.selectNode(node)
}"""
# Removes the nodes that a smaller graph lacks and sets the widgets that it has.
APPLY = """graph => {
    for (const node of [...app.graph._nodes]) {
        const small = graph[node.id]
        if (!small) app.graph.remove(node)
        else for (const widget of node.widgets ?? [])
            if (widget.name in small.inputs) widget.value = small.inputs[widget.name]
    }
}"""
# Queues the open graph as the Run button does, and notes how it ends and what previews come.
RUN = """async () => {
    window.seen = {ended: null, previews: []}
    for (const end of ["execution_success", "execution_error", "execution_interrupted"])
        app.api.addEventListener(end, event => window.seen.ended = [end, event.detail.exception_message])
    app.api.addEventListener("b_preview_with_metadata", async event => {
        const image = await createImageBitmap(event.detail.blob)
        window.seen.previews.push([event.detail.nodeId, image.width, image.height])
    })
    await app.queuePrompt(0)
    return app.lastNodeErrors
}"""


@pytest.fixture(autouse=True)
def no_complaint_about_us(complaints):
    complaints.clear()
    yield
    assert [text for text in complaints if re.search("wan21", text, re.IGNORECASE)] == []


@pytest.fixture(scope="module")
def object_info(server):
    return server.client.object_info()


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def with_defaults(graph, object_info):
    """An API graph with the optional inputs it leaves to their defaults, as the editor writes it.

    So a graph stays valid when a node gets a further input.
    """
    for node in graph.values():
        for name, spec in object_info[node["class_type"]]["input"].get("optional", {}).items():
            if len(spec) > 1 and "default" in spec[1]:
                node["inputs"].setdefault(name, spec[1]["default"])
    return graph


@each_workflow
def test_editor_and_api_graph_are_the_same(path, page, object_info):
    load_graph(page, read(path))
    assert {kind for kind, known in page.evaluate(REGISTERED) if not known} == set()
    api = read(path.parent / "api" / path.name)
    assert with_defaults(api_graph(page), object_info) == with_defaults(api, object_info), (
        "run scripts/make_workflows.py"
    )


def test_every_api_graph_has_an_editor_graph_and_a_thumbnail():
    names = {path.stem for path in WORKFLOWS}
    assert {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")} == names
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == names


@each_workflow
def test_nodes_do_not_overlap(path, page):
    load_graph(page, read(path))
    assert overlapping(page) == []


def overlapping(page):
    """Pairs of titles of nodes that lie over each other."""
    boxes = page.evaluate(BOXES)
    assert len(boxes) > 5
    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if overlap(a, b)]


def overlap(a, b):
    """Whether two [title, x, y, width, height] meet, their title bars above y included."""
    (_, ax, ay, aw, ah), (_, bx, by, bw, bh) = a, b
    return ax < bx + bw and bx < ax + aw and ay - TITLE_HEIGHT < by + bh and by - TITLE_HEIGHT < ay + ah


@each_workflow
def test_every_node_lies_in_one_group(path):
    graph = read(path)
    for node in graph["nodes"]:
        homes = [group["title"] for group in graph["groups"] if inside(node, group["bounding"])]
        assert len(homes) == (node["type"] not in EDITOR_ONLY), f"{node['title']} lies in {homes}"


def inside(node, bounding):
    (x, y), (width, height), (left, top, group_width, group_height) = node["pos"], node["size"], bounding
    return (
        left <= x
        and x + width <= left + group_width
        and top <= y - TITLE_HEIGHT
        and y + height <= top + group_height
    )


@each_workflow
def test_links_are_valid(path):
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for link, source, source_slot, target, target_slot, kind in graph["links"]:
        output, target_input = nodes[source]["outputs"][source_slot], nodes[target]["inputs"][target_slot]
        assert link in output["links"] and target_input["link"] == link
        assert output["type"] == kind and target_input["type"] in (kind, "*")
    linked = {slot["link"] for node in graph["nodes"] for slot in node["inputs"]} - {None}
    assert linked == {link[0] for link in graph["links"]}


@each_workflow
def test_loaders_offer_their_files(path):
    graph = read(path)
    [note] = [node for node in graph["nodes"] if node["type"] == "MarkdownNote"]
    loaders = [node for node in graph["nodes"] if node["type"].endswith("Loader")]
    assert loaders
    for node in loaders:
        if set(node["widgets_values"]) & set(bundled.FILES.values()):
            assert "models" not in node["properties"], "there is nothing to download"
            continue
        [model] = node["properties"]["models"]
        assert model["name"] in node["widgets_values"]
        assert model["url"].endswith(f"/{model['name']}")
        assert f"/{model['directory']}/" in model["url"] or "/WanVideo_comfy/" in model["url"]
        assert model["url"] in note["widgets_values"][0], "the note does not name it"


def test_template_browser_shows_and_opens_our_workflows(page, server):
    page.set_viewport_size(VIEWPORT | {"height": 2400})  # the list holds only what is in view
    assert set(server.client.get("/api/workflow_templates")[LINK_NAME]) == {path.stem for path in WORKFLOWS}
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text(LINK_NAME, exact=True).first.click()
    cards = [page.get_by_role("img", name=path.stem, exact=True) for path in WORKFLOWS]
    for card in cards:
        card.wait_for()
    page.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth)")
    cards[0].click()
    page.wait_for_function("app.graph._nodes.some(node => node.type === 'Wan21Sampler')")
    page.set_viewport_size(VIEWPORT)


@pytest.mark.parametrize("node_id", sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md")))
def test_editor_shows_help_page(node_id, page):
    load_graph(page, read(ROOT / "workflows" / "i2v.json"))
    page.evaluate(SELECT, node_id)
    page.get_by_test_id("info-button").click()
    title = (ROOT / "web" / "docs" / f"{node_id}.md").read_text(encoding="utf-8").splitlines()[0]
    page.get_by_role("heading", name=title.removeprefix("# "), level=1).wait_for()


def test_graph_runs_from_the_editor(page, server):
    api = read(ROOT / "workflows" / "api" / "i2v.json")
    small = small_graph(api, num_frames=4 * LATENT_FRAMES - 3)
    load_graph(page, read(ROOT / "workflows" / "i2v.json"))
    page.evaluate(APPLY, small)
    before = videos(server)
    assert not page.evaluate(RUN)
    page.wait_for_function("window.seen.ended")
    seen = page.evaluate("() => window.seen")
    assert seen["ended"][0] == "execution_success", seen["ended"][1]
    sampler = next(node_id for node_id, node in small.items() if node["class_type"] == "Wan21Sampler")
    previews = [(width, height) for node_id, width, height in seen["previews"] if node_id == sampler]
    assert previews, "no preview of the sampler came"
    assert {round(width / height) for width, height in previews} == {LATENT_FRAMES}, "not a strip of frames"
    assert [file.suffix for file in videos(server) - before] == [".mp4"]
    assert overlapping(page) == [], "with the preview and the video shown"
    report = "() => app.graph._nodes.find(node => node.title === 'Report').widgets.map(w => String(w.value))"
    assert any("seed: 0" in value for value in page.evaluate(report))


def videos(server):
    """Files that the graphs of all tests have written so far."""
    return set((server.output_directory / "wan21").glob("*"))
