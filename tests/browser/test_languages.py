"""Our nodes in the editor in Chinese, in the classic renderer and in Nodes 2.0."""

import json

import pytest
from lib.editor import READY, SETTINGS
from lib.pack import ROOT

CHINESE = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
GROUP = "cache"  # its settings come with the choice `teacache`
# What a new node of a type shows: title, widgets, inputs and outputs, as the editor draws them.
SHOWN = """([type, group, choice]) => {
    // Not clear(): a new node would get the last one's number, and what is kept of its widgets.
    for (const node of [...app.graph._nodes]) app.graph.remove(node)
    const node = LiteGraph.createNode(type)
    app.graph.add(node)
    const widget = (node.widgets ?? []).find(widget => widget.name === group)
    if (widget) { widget.value = choice; widget.callback?.(choice) }
    const label = slot => slot.label || slot.localized_name || slot.name
    return {
        title: node.getTitle(),
        widgets: Object.fromEntries((node.widgets ?? [])
            .filter(w => !w.options?.advanced && w.name !== "control_after_generate")
            .map(w => [w.name, w.label || w.name])),
        inputs: Object.fromEntries(node.inputs.map(slot => [slot.name, label(slot)])),
        outputs: node.outputs.map(label),
        tooltips: Object.fromEntries((node.widgets ?? []).map(w => [w.name, w.tooltip])),
    }
}"""
# In Nodes 2.0 a node is part of the document.
ON_THE_PAGE = """texts => {
    const nodes = [...document.querySelectorAll('[data-node-id]')]
    return nodes.length === 1 && texts.every(text => nodes[0].innerText.includes(text))
}"""


@pytest.fixture(params=[False, True], ids=["classic", "nodes-2"])
def chinese_page(request, page, server):
    """The editor, loaded anew in Chinese."""
    server.client.post("/settings", {"Comfy.Locale": "zh", "Comfy.VueNodes.Enabled": request.param})
    page.reload()
    page.wait_for_function(READY)
    yield page, request.param
    server.client.post("/settings", SETTINGS | {"Comfy.VueNodes.Enabled": False})
    page.reload()
    page.wait_for_function(READY)


def names(node_id):
    """{input as the translations write it: its Chinese name}"""
    return {key: texts["name"] for key, texts in CHINESE[node_id]["inputs"].items()}


def test_nodes_are_in_chinese(chinese_page):
    page, nodes_2 = chinese_page
    for node_id, texts in CHINESE.items():
        shown = page.evaluate(SHOWN, [node_id, GROUP, "teacache"])
        assert shown["title"] == texts["display_name"]
        expected = names(node_id)
        for name, label in (shown["inputs"] | shown["widgets"]).items():
            assert label == expected[name.replace(".", "_")], (node_id, name)
        for index, output in texts.get("outputs", {}).items():
            assert shown["outputs"][int(index)] == output["name"]
        if nodes_2:
            texts_shown = [shown["title"], *shown["widgets"].values(), *shown["outputs"]]
            page.wait_for_function(ON_THE_PAGE, arg=texts_shown)
    sampler, inputs = (
        page.evaluate(SHOWN, ["Wan21Sampler", GROUP, "teacache"]),
        CHINESE["Wan21Sampler"]["inputs"],
    )
    for setting in (f"{GROUP}.multiplier", f"{GROUP}.profile"):
        assert setting in sampler["widgets"]
        # What stands here the editor shows before any translation of its own.
        assert sampler["tooltips"][setting] == inputs[setting.replace(".", "_")]["tooltip"]
