"""The editor's other languages name everything of our nodes: `locales/<code>/nodeDefs.json`."""

import json
import re
from collections import Counter

import pytest
from lib.pack import LINK_NAME, ROOT
from wan21.host.node_inputs import describe_inputs

LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "es", "ru", "de", "pt-BR")
SYNTAX = re.compile(r"[@{}|%]\S|[@{}|]")  # what the editor's translations take for more than text
NUMBER = re.compile(r"\d+(?:\.\d+)?")

each_language = pytest.mark.parametrize("language", LANGUAGES)


@pytest.fixture(scope="module")
def english(server):
    """{(node, key ...): text} of everything that the editor translates, from the running host."""
    nodes = {
        node_id: translatable(node)
        for node_id, node in server.client.object_info().items()
        if node["python_module"] == f"custom_nodes.{LINK_NAME}"
    }
    assert nodes
    return flat(nodes)


def translatable(node):
    """A node as a translation of it is written; the editor looks `group.setting` up as `group_setting`."""
    inputs = {
        name.replace(".", "_"): {"name": name}
        | ({"tooltip": options["tooltip"]} if options.get("tooltip") else {})
        for name, options in describe_inputs(node["input"]).items()
    }
    # An output that is named like its type is translated by the editor itself.
    outputs = {
        str(index): {"name": name}
        for index, (name, kind) in enumerate(zip(node["output_name"], node["output"]))
        if name != kind
    }
    texts = {"display_name": node["display_name"], "description": node["description"], "inputs": inputs}
    return texts | ({"outputs": outputs} if outputs else {})


def flat(tree, path=()):
    if isinstance(tree, str):
        return {path: tree}
    return {key: text for name, branch in tree.items() for key, text in flat(branch, (*path, name)).items()}


def translation(language):
    path = ROOT / "locales" / language / "nodeDefs.json"
    return flat(json.loads(path.read_text(encoding="utf-8")))


def test_languages_are_those_listed():
    assert {path.name for path in (ROOT / "locales").iterdir()} == set(LANGUAGES)


@each_language
def test_every_text_is_translated_and_none_is_left_over(language, english):
    translated = translation(language)
    assert translated.keys() == english.keys()
    assert [key for key, text in translated.items() if not text.strip()] == []


@each_language
def test_texts_are_plain_and_name_the_same_numbers(language, english):
    """A number that was lost or mistyped is found, and a text that the editor would not show as it stands.

    Some languages write in figures what English writes as a word (2倍 for twice): more are no mistake.
    """
    for key, text in translation(language).items():
        assert not SYNTAX.search(text), (key, text)
        if key[-1] in {"tooltip", "description"}:
            lost = Counter(NUMBER.findall(english[key])) - Counter(NUMBER.findall(text))
            assert not lost, (key, text, lost)


@each_language
def test_descriptions_and_tooltips_are_not_english(language, english):
    for key, text in translation(language).items():
        if key[-1] in {"tooltip", "description"}:
            assert text != english[key], key


def test_host_serves_the_translations(client):
    served = json.loads(client._request("/i18n"))
    for language in LANGUAGES:
        assert translation(language).items() <= flat(served[language]["nodeDefs"]).items(), language
