"""Every node of ours explains itself: help pages that name its inputs, in English and Chinese; tooltips."""

import json
import re

import pytest
from lib.pack import LINK_NAME, ROOT
from wan21.host.node_inputs import describe_inputs

PAGES = ROOT / "web" / "docs"
# Inputs that need no tooltip.
SELF_EXPLAINING = {"width", "height", "steps", "solver"}
# How the pages of a language name what is compared: headings, on and off, an empty text, a range, files.
WORDS = {
    "en": {
        "inputs": "Inputs",
        "outputs": "Outputs",
        True: "on",
        False: "off",
        "": "empty",
        "to": " to ",
        "files": "files",
    },
    "zh": {
        "inputs": "输入",
        "outputs": "输出",
        True: "开",
        False: "关",
        "": "空",
        "to": " 至 ",
        "files": "文件",
    },
}
# - `name` Name on the node (values, **default**): meaning
ENTRY = re.compile(r"^( *)- `(\w+)`(?: ([^(:]+?))?(?: \((.*?)\))?: ", re.MULTILINE)

each_language = pytest.mark.parametrize("language", WORDS)


@pytest.fixture(scope="module")
def our_nodes(server):
    return {
        node_id: node
        for node_id, node in server.client.object_info().items()
        if node["python_module"] == f"custom_nodes.{LINK_NAME}"
    }


def page_of(node_id, language):
    """Where the editor looks for it: the page of a language in the node's folder, else the one beside it."""
    path = PAGES / f"{node_id}.md" if language == "en" else PAGES / node_id / f"{language}.md"
    return path.read_text(encoding="utf-8")


def section(page, title):
    """{name: values} of the list under a heading, in order; `group.setting` for what stands below a group."""
    return {name: values for name, (_, values) in entries_of(page, title).items()}


def entries_of(page, title):
    """{name: (name on the node in another language, values)}"""
    body = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    entries, group = {}, None
    for indent, name, shown, values in ENTRY.findall(body):
        group = group if indent else name
        entries[f"{group}.{name}" if indent else name] = (shown, values)
    return entries


def test_every_node_has_its_pages_and_every_page_a_node(our_nodes):
    assert our_nodes
    assert {path.stem for path in PAGES.glob("*.md")} == our_nodes.keys()
    assert {(path.parent.name, path.name) for path in PAGES.glob("*/*")} == {
        (name, "zh.md") for name in our_nodes
    }


@each_language
def test_pages_name_the_inputs_and_outputs(language, our_nodes):
    words = WORDS[language]
    for node_id, node in our_nodes.items():
        page = page_of(node_id, language)
        title = node["display_name"] if language == "en" else chinese(node_id)["display_name"]
        assert page.startswith(f"# {title}\n")
        assert [*section(page, words["inputs"])] == [*describe_inputs(node["input"])], node_id
        assert [*section(page, words["outputs"])] == node["output_name"], node_id


def chinese(node_id):
    path = ROOT / "locales" / "zh" / "nodeDefs.json"
    return json.loads(path.read_text(encoding="utf-8"))[node_id]


def test_chinese_pages_name_what_stands_on_the_node(our_nodes):
    for node_id in our_nodes:
        page, texts = page_of(node_id, "zh"), chinese(node_id)
        for name, (shown, _) in entries_of(page, "输入").items():
            assert shown == texts["inputs"][name.replace(".", "_")]["name"], (node_id, name)
        names = [shown for shown, _ in entries_of(page, "输出").values() if shown]
        assert names == [output["name"] for output in texts.get("outputs", {}).values()], node_id


@each_language
def test_defaults_are_those_documented(language, our_nodes):
    """A default stands in bold among its input's values."""
    words = WORDS[language]
    for node_id, node in our_nodes.items():
        values = section(page_of(node_id, language), words["inputs"])
        for name, default in defaults(node):
            shown = words[default] if isinstance(default, bool) or default == "" else f"{default}"
            shown = f"{default:g}" if isinstance(default, float) else shown
            assert f"**{shown}**" in values[name], f"{node_id}.{name}: {shown} is not in {values[name]}"


@each_language
def test_ranges_and_choices_are_those_documented(language, our_nodes):
    """Lists of installed files are not choices of ours."""
    words = WORDS[language]
    checked = 0
    for node_id, node in our_nodes.items():
        documented = section(page_of(node_id, language), words["inputs"])
        for name, (kind, options) in widgets(node):
            values = documented[name].replace("**", "")
            if kind in {"INT", "FLOAT"}:
                highest = "2⁶⁴-1" if options["max"] == 2**64 - 1 else f"{options['max']:g}"
                wanted = f"{options['min']:g}{words['to']}{highest}, "
                assert values.startswith(wanted), f"{node_id}.{name}: {values}"
            elif kind == "COMBO" and words["files"] not in values:
                assert set(values.split(", ")) == set(options["options"]), f"{node_id}.{name}: {values}"
            else:
                continue
            checked += 1
    assert checked > 25


def defaults(node):
    for name, options in describe_inputs(node["input"]).items():
        if "default" in options:
            yield name, options["default"]


def test_pages_are_served(client, our_nodes):
    for node_id in our_nodes:
        for file in (f"{node_id}.md", f"{node_id}/zh.md"):
            assert client._request(f"/extensions/{LINK_NAME}/docs/{file}") == (PAGES / file).read_bytes()


def test_widgets_have_tooltips_and_combos_options(our_nodes):
    for node_id, node in our_nodes.items():
        assert node["description"]
        for name, (kind, options) in widgets(node):
            assert options.get("tooltip") or name in SELF_EXPLAINING, f"{node_id}.{name} has no tooltip"
            if kind == "COMBO":
                assert options["options"], f"{node_id}.{name} offers nothing"
                assert options.get("default", options["options"][0]) in options["options"]


def widgets(node):
    """Inputs that are set on the node itself; (name, (type, options))."""
    for name, options in describe_inputs(node["input"]).items():
        if options["type"] in {"INT", "FLOAT", "BOOLEAN", "STRING", "COMBO"}:
            yield name, (options["type"], options)
