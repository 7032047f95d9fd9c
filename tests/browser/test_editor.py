"""The workflows and help pages in the real editor."""

import itertools
import json
import re

import pytest
from lib import bundled
from lib.comfy_client import fill
from lib.editor import VIEWPORT, api_graph, load_graph
from lib.pack import LINK_NAME, ROOT
from lib.small_graphs import small_graph

WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
APP = ".app"  # the same graph as a form
GRAPHS = [path for path in WORKFLOWS if not path.stem.endswith(APP)]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
I2V = "Wan2.1 image to video (i2v).json"
EDITOR_ONLY = {"MarkdownNote", "Note"}  # not part of what is queued
TITLE_HEIGHT = 30
LATENT_FRAMES = 3
QUICK_START = "Wan2.1 - quick start.json"
RUNS = {I2V: (112, 64), QUICK_START: (64, 64)}  # sizes of runs, in the shape that the graphs make
LAPTOP = {"width": 1600, "height": 900}
LEAST_ZOOM = 0.572  # below it the classic renderer draws no text
DRAWN_MS = 1500  # Nodes 2.0 measures its nodes after it has drawn them

each_workflow = pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)

REGISTERED = "() => app.graph._nodes.map(node => [node.type, node.type in LiteGraph.registered_node_types])"
WIDGETS = """() => app.graph._nodes.map(
    node => [node.title, (node.widgets ?? []).map(widget => [widget.name, widget.value])])"""
BOXES = "() => app.graph._nodes.map(node => [node.title, ...node.pos, ...node.size])"
# Title, left, top, width and height with the bars below a node of Nodes 2.0, which hang out of its box.
DRAWN = """() => [...document.querySelectorAll('[data-node-id]')].map(element => {
    const node = app.graph.getNodeById(element.dataset.nodeId), {scale, offset} = app.canvas.ds
    const boxes = [element, ...element.querySelectorAll('*')].map(one => one.getBoundingClientRect())
    const seen = boxes.filter(box => box.width && box.height), own = element.getBoundingClientRect()
    const bottom = Math.max(...seen.filter(box => box.left >= own.left - 1).map(box => box.bottom))
    const canvas = document.querySelector('#graph-canvas').getBoundingClientRect()
    return [node.title,
            (own.left - canvas.left) / scale - offset[0], (own.top - canvas.top) / scale - offset[1],
            own.width / scale, (bottom - own.top) / scale]
})"""
SAID = """() => document.body.innerText
    + app.graph._nodes.flatMap(node => node.widgets ?? []).map(widget => widget.value).join()"""
# The boxes that show no more than a part of the sentence with the time and memory of a run.
CUT_OFF = """() => {
    const all = [...document.querySelectorAll('*')].filter(one => one.innerText?.includes('s per step'))
    const clips = one => getComputedStyle(one).overflowY !== 'visible'
    const cut = one => one.scrollHeight > one.clientHeight + 1 && clips(one)
    return [all.length, all.filter(one => one.closest('.dom-widget, [data-node-id]') && cut(one)).length]
}"""
# Every node of ours says two lines, as of a file's keys that are left out; how many there are.
SPEAK = """() => {
    const ours = app.graph._nodes.filter(node => node.type.startsWith('Wan21'))
    const text = 'one line of what a node has to say\\nand another'
    for (const {id} of ours) app.api.dispatchCustomEvent('progress_text', {nodeId: String(id), text})
    return ours.length
}"""
FIT = """async () => {
    await app.extensionManager.command.execute('Comfy.Canvas.FitView')
    await new Promise(done => setTimeout(done, 1000))
    return app.canvas.ds.scale
}"""
# Nodes 2.0 takes its elements away later than the graph its nodes.
EMPTY = "() => !app.graph._nodes.length && !document.querySelector('[data-node-id]')"
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


@pytest.fixture(scope="module", params=["classic", "nodes 2.0"])
def drawn_by(request):
    return request.param


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
    assert by_title(with_defaults(api_graph(page), object_info)) == by_title(
        with_defaults(api, object_info)
    ), "run scripts/make_workflows.py"


@pytest.mark.parametrize(
    "path", [path for path in GRAPHS if read(path).get("definitions")], ids=lambda p: p.stem
)
def test_folded_nodes_show_what_they_hold(path, page):
    """Linked widgets count among the values: the prompt of a segment had been drawn as its width."""
    graph = read(path)
    load_graph(page, graph)
    shown = dict(page.evaluate(WIDGETS))
    kinds = {one["id"] for one in graph["definitions"]["subgraphs"]}
    boxes = [node for node in graph["nodes"] if node["type"] in kinds]
    for node in boxes:
        names = [slot["name"] for slot in node["inputs"] if "widget" in slot]
        held = list(zip(names, node["widgets_values"], strict=True))
        assert [tuple(pair) for pair in shown[node["title"]]] == held
    assert boxes


def by_title(graph):
    """An API graph by titles: nodes of a subgraph have other numbers."""
    titles = {node_id: node["_meta"]["title"] for node_id, node in graph.items()}

    def named(value):
        return (titles[value[0]], value[1]) if isinstance(value, list) else value

    return {
        titles[node_id]: {
            "class_type": node["class_type"],
            "inputs": {k: named(v) for k, v in node["inputs"].items()},
        }
        for node_id, node in graph.items()
    }


def test_every_api_graph_has_an_editor_graph_and_a_thumbnail():
    names = {path.stem for path in GRAPHS}
    assert {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")} == names
    assert {path.stem for path in (ROOT / "workflows").glob("*.jpg")} == {path.stem for path in WORKFLOWS}


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path not in GRAPHS], ids=lambda p: p.stem)
def test_an_app_is_its_graph_with_a_form(path):
    app, graph = read(path), read(path.with_name(path.name.replace(APP, "")))
    form = app["extra"].pop("linearData")
    assert app["extra"].pop("linearMode") is True
    named = [slot.pop("label") for node in app["nodes"] for slot in node["inputs"] if "label" in slot]
    assert named == ["prompt"], "the form says it for text"
    assert app | {"id": None} == graph | {"id": None}
    widgets = {
        (node["id"], slot["name"]) for node in app["nodes"] for slot in node["inputs"] if "widget" in slot
    }
    assert form["inputs"] and {tuple(pair) for pair in form["inputs"]} <= widgets
    assert [n["type"] for n in app["nodes"] if n["id"] in form["outputs"]] == ["SaveVideo"]


@each_workflow
def test_nodes_lie_apart_in_their_groups_and_are_read(path, page, drawn_by):
    """Opened on a laptop: nothing over another or out of its group, bars included, and text is drawn."""
    page.set_viewport_size(LAPTOP)
    try:
        load_graph(page, read(path))
        page.wait_for_timeout(DRAWN_MS if drawn_by == "nodes 2.0" else 0)
        assert page.evaluate(FIT) >= LEAST_ZOOM
        boxes = boxes_of(page, drawn_by)
        assert overlapping(boxes) == []
        assert homeless(boxes, read(path)) == []
        spoke = page.evaluate(SPEAK)
        page.wait_for_timeout(DRAWN_MS)
        boxes = boxes_of(page, drawn_by)
        assert spoke >= 3 and overlapping(boxes) == [], "a node that says something lies over the next"
    finally:
        page.set_viewport_size(VIEWPORT)


def boxes_of(page, drawn_by):
    """[title, left, top, width, height] of each node, title bar and the bars below it included."""
    if drawn_by == "nodes 2.0":
        boxes = page.evaluate(DRAWN)
    else:
        boxes = [
            (title, x, y - TITLE_HEIGHT, w, h + TITLE_HEIGHT) for title, x, y, w, h in page.evaluate(BOXES)
        ]
    assert len(boxes) > 5
    return boxes


def overlapping(boxes):
    """Pairs of titles of nodes that lie over each other."""
    return [(a[0], b[0]) for a, b in itertools.combinations(boxes, 2) if overlap(a, b)]


def overlap(a, b):
    """Whether two [title, left, top, width, height] meet."""
    (_, ax, ay, aw, ah), (_, bx, by, bw, bh) = a, b
    return ax < bx + bw and bx < ax + aw and ay < by + bh and by < ay + ah


def homeless(boxes, graph):
    """The nodes that do not lie in one group, and the groups they lie in; the note lies in none."""
    groups = {group["title"]: group["bounding"] for group in graph["groups"]}
    homes = [(box, [title for title, where in groups.items() if inside(box, where)]) for box in boxes]
    return [(box, found) for box, found in homes if len(found) != (box[0] != "Read me")]


def inside(box, bounding):
    (_, x, y, width, height), (left, top, group_width, group_height) = box, bounding
    return left <= x and x + width <= left + group_width and top <= y and y + height <= top + group_height


@each_workflow
def test_links_are_valid(path):
    graph = read(path)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for part in graph.get("definitions", {"subgraphs": []})["subgraphs"]:
        linked = {slot["link"] for node in part["nodes"] for slot in node["inputs"]} - {None}
        assert linked == {link["id"] for link in part["links"] if link["target_id"] != -20}
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


SEARCHES = [
    "image to video",
    "wan 2.1",
    "first last frame",
    "4 steps",
    "long video",
    "text to video",
    "wan 2.2",
    "quick start",
    "i2v",
    "flf2v",
    "lightx2v",
    "wan 2.2 4 steps",
    "low vram",
]
SHOWN_CARDS = """() => [...document.querySelectorAll('[data-testid^=template-workflow-]')]
    .map(card => [card.dataset.testid.replace('template-workflow-', ''), /\\bApp$/.test(card.innerText)])"""


def test_template_browser_shows_finds_and_opens_our_workflows(tab, server):
    tab.set_viewport_size(VIEWPORT | {"height": 4800})  # the list holds only what is in view
    assert set(server.client.get("/api/workflow_templates")[LINK_NAME]) == {path.stem for path in WORKFLOWS}
    tab.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    browser = tab.get_by_role("dialog")  # a node of Nodes 2.0 names our pack, too
    browser.get_by_text(LINK_NAME, exact=True).click()
    cards = {path.stem: browser.get_by_role("img", name=path.stem, exact=True) for path in WORKFLOWS}
    cards["Wan2.2 text to video (t2v)"].wait_for()
    shown = tab.evaluate(SHOWN_CARDS)
    assert [name for name, _ in shown] == sorted(cards), "the quick start first"
    assert {name for name, is_app in shown if is_app} == {name for name in cards if name.endswith(APP)}
    search = browser.get_by_placeholder("Search ...")
    for text in SEARCHES:
        search.fill(text)
        words = [word for word in text.split() if word != "wan"]
        wanted = [name for name in cards if all(word in name.lower() for word in words)]
        assert wanted
        for name in wanted:
            cards[name].wait_for()
    search.fill("wan2.1 image to video")
    tab.wait_for_function("() => [...document.images].every(image => image.complete && image.naturalWidth)")
    cards["Wan2.1 image to video (i2v)"].click()
    tab.wait_for_function("app.graph._nodes.some(node => node.type === 'Wan21Sampler')")


BLUEPRINT_OF = {
    "Wan2.1 Image to Video Pipeline": "Wan2.1 image to video (i2v)",
    "Wan2.1 First-Last-Frame to Video": "Wan2.1 first and last frame (flf2v)",
    "Wan2.1 Image to Video 4 Steps": "Wan2.1 4 steps image to video (lightx2v)",
}


def test_every_blueprint_has_its_graph():
    assert {path.stem for path in BLUEPRINTS} == BLUEPRINT_OF.keys()


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_node_of_the_node_search(path, tab):
    """Its name is typed, and what comes is the graph without images and file, with its values."""
    tab.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    tab.wait_for_function(EMPTY)
    # What a double click on the empty canvas does, without its two clicks being too far apart.
    tab.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    tab.get_by_role("combobox", name="Add a node...").fill(path.stem)
    tab.locator("#results-list").get_by_text(path.stem, exact=True).first.click()
    tab.wait_for_function("title => app.graph._nodes.some(node => node.title === title)", arg=path.stem)
    inner = by_title(api_graph(tab))
    graph = by_title(read(ROOT / "workflows" / "api" / f"{BLUEPRINT_OF[path.stem]}.json"))
    assert inner.keys() == graph.keys() - {"Start image", "End image", "Save video"}
    for title, made in inner.items():
        from_outside = {k: v for k, v in graph[title]["inputs"].items() if is_link(v) and v[0] not in inner}
        assert made["class_type"] == graph[title]["class_type"]
        assert made["inputs"].items() >= (graph[title]["inputs"].items() - from_outside.items())
    assert read(path)["extra"]["BlueprintDescription"].endswith("in one node.")


def is_link(value):
    return isinstance(value, tuple)


@pytest.mark.parametrize("name", RUNS)
def test_graph_runs_from_the_editor(name, page, server, drawn_by):
    api = read(ROOT / "workflows" / "api" / name)
    width, height = RUNS[name]
    small = small_graph(api, RUNS[name], num_frames=4 * LATENT_FRAMES - 3)
    seed = 1 + (drawn_by == "classic")  # the host would not run the same again
    small = fill(small, "Sampler", seed=seed)
    load_graph(page, read(ROOT / "workflows" / name))
    page.evaluate(APPLY, small)
    before = videos(server)
    assert not page.evaluate(RUN)
    page.wait_for_function(
        "window.seen.ended && window.seen.previews.length"
    )  # decoded by the page in its time
    seen = page.evaluate("() => window.seen")
    assert seen["ended"][0] == "execution_success", seen["ended"][1]
    sampler = next(node_id for node_id, node in small.items() if node["class_type"] == "Wan21Sampler")
    previews = [(w / width, h / height) for node_id, w, h in seen["previews"] if node_id == sampler]
    assert previews, "no preview of the sampler came"
    assert {round(w / h) for w, h in previews} == {LATENT_FRAMES}, "not a strip of frames"
    assert [file.suffix for file in videos(server) - before] == [".mp4"]
    page.wait_for_timeout(DRAWN_MS)
    boxes = boxes_of(page, drawn_by)  # with the preview and the video shown
    assert overlapping(boxes) == [] and homeless(boxes, read(ROOT / "workflows" / name)) == []
    said = page.evaluate(SAID)
    assert "s per step" in said, "time and memory stand on the sampler"
    showing, cut_off = page.evaluate(CUT_OFF)
    assert showing and not cut_off, "the sentence is read without scrolling"


def videos(server):
    """Files that the graphs of all tests have written so far."""
    return set((server.output_directory / "wan21").glob("*"))


# Of a new node: [names by the graph, rows that Nodes 2.0 has drawn]. What follows a seed is the editor's, on
# every node with one, in the seed's row or its own.
FIRST_SIGHT = """async () => {
    const node = LiteGraph.createNode('Wan21Sampler')
    app.graph.add(node)
    await new Promise(done => setTimeout(done, 1000))
    const own = node.widgets.filter(w => w.name !== 'control_after_generate')
    const shown = own.filter(w => !w.hidden && !w.options?.hidden)
    const rows = document.querySelectorAll(`[data-node-id="${node.id}"] .lg-node-widget`).length
    app.graph.remove(node)
    return [shown.map(w => w.name), rows]
}"""


def test_a_new_sampler_shows_few_fields(page, drawn_by):
    names, rows = page.evaluate(FIRST_SIGHT)
    assert names[0] == "seed" and len(names) <= 13
    if drawn_by == "nodes 2.0":
        assert 10 < rows <= 13
