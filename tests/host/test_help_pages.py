"""Every node of ours explains itself: a help page that names its inputs, and tooltips."""

import re

import pytest
from lib.pack import LINK_NAME, ROOT
from wan21.host.node_inputs import describe_inputs

PAGES = ROOT / "web" / "docs"
# Inputs that need no tooltip.
SELF_EXPLAINING = {"width", "height", "steps", "solver"}


@pytest.fixture(scope="module")
def our_nodes(server):
    return {
        node_id: node
        for node_id, node in server.client.object_info().items()
        if node["python_module"] == f"custom_nodes.{LINK_NAME}"
    }


def section(page, title):
    """First column of the table under a heading, in order."""
    body = page.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| `([\w.]+)` \|", body, re.MULTILINE)


def test_every_node_has_a_page_and_every_page_a_node(our_nodes):
    assert our_nodes
    assert {path.stem for path in PAGES.glob("*.md")} == our_nodes.keys()


def test_pages_name_the_inputs_and_outputs(our_nodes):
    for node_id, node in our_nodes.items():
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        assert page.startswith(f"# {node['display_name']}\n")
        assert section(page, "Inputs") == [*describe_inputs(node["input"])], node_id
        assert section(page, "Outputs") == node["output_name"], node_id


def test_defaults_are_those_documented(our_nodes):
    """A default stands in bold in its input's row."""
    for node_id, node in our_nodes.items():
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        for name, default in defaults(node):
            row = re.search(rf"^\| `{name}` \|.*$", page, re.MULTILINE)[0]
            shown = (
                {True: "on", False: "off"}[default] if isinstance(default, bool) else format_default(default)
            )
            assert f"**{shown}**" in row, f"{node_id}.{name}: {shown} is not in {row}"


def test_ranges_and_choices_are_those_documented(our_nodes):
    """Lists of installed files are not choices of ours."""
    checked = 0
    for node_id, node in our_nodes.items():
        page = (PAGES / f"{node_id}.md").read_text(encoding="utf-8")
        for name, (kind, options) in widgets(node):
            values = re.search(rf"^\| `{name}` \| (.*?) \|", page, re.MULTILINE)[1].replace("**", "")
            if kind in {"INT", "FLOAT"}:
                highest = "2⁶⁴-1" if options["max"] == 2**64 - 1 else f"{options['max']:g}"
                assert values.startswith(f"{options['min']:g} to {highest}, "), f"{node_id}.{name}: {values}"
            elif kind == "COMBO" and "files" not in values:
                assert set(values.split(", ")) == set(options["options"]), f"{node_id}.{name}: {values}"
            else:
                continue
            checked += 1
    assert checked > 25


def defaults(node):
    for name, options in describe_inputs(node["input"]).items():
        if "default" in options:
            yield name, options["default"]


def format_default(default):
    return f"{default:g}" if isinstance(default, float) else str(default) or "empty"


def test_pages_are_served(client, our_nodes):
    for node_id in our_nodes:
        page = (PAGES / f"{node_id}.md").read_bytes()
        assert client._request(f"/extensions/{LINK_NAME}/docs/{node_id}.md") == page


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
