"""Nodes of a graph in the editor's own format, folded into one: a subgraph, or a blueprint of one.

A subgraph node shows chosen inputs of the nodes inside as its own. The editor keeps what is inside once,
under `definitions`, by the identifier that is the node's type.
"""

import uuid
from dataclasses import dataclass

INPUTS, OUTPUTS = -10, -20  # the editor's own numbers for the two edges of a subgraph
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # what a seed's second widget holds


@dataclass(frozen=True)
class Fold:
    """What becomes one node.

    Attributes:
        title: of it.
        titles: of the nodes inside.
        shown: (title inside, input, label) that stand on it, from top to bottom.
        labels: names of its sockets, by (title inside, input) or (title inside, output number).
        description: one sentence, for the node search.
    """

    title: str
    titles: tuple[str, ...]
    shown: tuple[tuple[str, str, str], ...] = ()
    labels: tuple[tuple[str, str | int, str], ...] = ()
    description: str = ""


def folded(graph, fold, name):
    """The graph with one node in place of the nodes that `fold` names.

    Args:
        graph: in the editor's format; not changed.
        fold: what to fold.
        name: what the identifiers are made from: the same name gives the same ones.
    """
    inside = {node["id"]: _copy(node) for node in graph["nodes"] if node["title"] in fold.titles}
    missing = set(fold.titles) - {node["title"] for node in inside.values()}
    if missing:
        raise SystemExit(f"{fold.title}: no node is called {', '.join(sorted(missing))}.")
    box = _Box(fold, name, inside, graph["last_node_id"] + 1, graph["last_link_id"])
    links = [new for link in graph["links"] for new in box.link(link)]
    box.show_inputs()
    outside = [_copy(node) for node in graph["nodes"] if node["id"] not in inside]
    _relink(outside, links)
    definitions = graph.get("definitions", {"subgraphs": []})
    return graph | {
        "nodes": [*outside, box.node(links)],
        "links": links,
        "last_node_id": box.node_id,
        "last_link_id": box.last_link,
        "definitions": {"subgraphs": [*definitions["subgraphs"], box.definition()]},
    }


def blueprint(graph, fold, aliases=()):
    """A graph of one node, as the editor keeps in its node search.

    Args:
        graph: in the editor's format; not changed.
        fold: what becomes the node. What else is in the graph is left out.
        aliases: words by which the search finds it too.
    """
    whole = folded(graph, fold, "blueprint")
    [node] = [node for node in whole["nodes"] if node["title"] == fold.title]
    for slot in node["inputs"]:
        slot["link"] = None
    for slot in node["outputs"]:
        slot["links"] = []
    extra = {"BlueprintDescription": fold.description, "BlueprintSearchAliases": list(aliases)}
    return whole | {"nodes": [node], "links": [], "groups": [], "extra": extra}


def _copy(node):
    return node | {
        "inputs": [dict(slot) for slot in node.get("inputs", [])],
        "outputs": [slot | {"links": []} for slot in node.get("outputs", [])],
    }


def _relink(nodes, links):
    """Let the slots of nodes outside name their links again."""
    by_id = {node["id"]: node for node in nodes}
    for number, source, source_slot, _, _, _ in links:
        if source in by_id:
            by_id[source]["outputs"][source_slot]["links"].append(number)


def _value(node, name):
    """What the widget of a node holds."""
    widgets = [slot["name"] for slot in node["inputs"] if "widget" in slot]
    return [value for value in node["widgets_values"] if value not in CONTROLS][widgets.index(name)]


class _Box:
    """A subgraph while it is made."""

    def __init__(self, fold, name, inside, node_id, last_link):
        self.fold, self.inside, self.node_id, self.last_link = fold, inside, node_id, last_link
        self.identifier = str(uuid.uuid5(uuid.NAMESPACE_URL, f"wan21/{name}/{fold.title}"))
        self.labels = {(title, what): label for title, what, label in fold.labels}
        self.inputs, self.outputs, self.links = [], [], []
        self.shown = []  # (name on the box, value)
        self.sources, self.targets = {}, {}  # (node, slot, label), (node, slot) -> number on the box

    def link(self, link):
        """Takes a link of the graph; yields what of it stays outside."""
        number, source, source_slot, target, target_slot, kind = link
        if source in self.inside and target in self.inside:
            self._inner(source, source_slot, target, target_slot, kind)
        elif target in self.inside:
            node = self.inside[target]
            name = node["inputs"][target_slot]["name"]
            label = self.labels.get((node["title"], name), name)
            is_new = (source, source_slot, label) not in self.sources
            if is_new:
                self.sources[source, source_slot, label] = self._add(self.inputs, label, kind)
                if "widget" in node["inputs"][target_slot]:
                    # The editor makes a widget of it, linked or not, and counts it among the values.
                    self.shown.append((self.inputs[-1]["name"], _value(node, name)))
            index = self.sources[source, source_slot, label]
            self._inner(INPUTS, index, target, target_slot, kind)
            if is_new:
                yield [number, source, source_slot, self.node_id, index, kind]
        elif source in self.inside:
            if (source, source_slot) not in self.targets:
                node = self.inside[source]
                label = self.labels.get((node["title"], source_slot), node["outputs"][source_slot]["name"])
                self.targets[source, source_slot] = self._add(self.outputs, label, kind)
                self._inner(source, source_slot, OUTPUTS, self.targets[source, source_slot], kind)
            yield [number, self.node_id, self.targets[source, source_slot], target, target_slot, kind]
        else:
            yield link

    def _add(self, slots, label, kind):
        name = label
        while name in {slot["name"] for slot in slots}:
            name += "_"
        identifier = uuid.uuid5(uuid.UUID(self.identifier), f"{len(self.inputs)} {len(self.outputs)} {name}")
        slots.append({"id": str(identifier), "name": name, "label": label, "type": kind, "linkIds": []})
        return len(slots) - 1

    def _inner(self, source, source_slot, target, target_slot, kind):
        self.last_link += 1
        number = self.last_link
        self.links.append(
            {
                "id": number,
                "origin_id": source,
                "origin_slot": source_slot,
                "target_id": target,
                "target_slot": target_slot,
                "type": kind,
            }
        )
        if source == INPUTS:
            self.inputs[source_slot]["linkIds"].append(number)
        else:
            self.inside[source]["outputs"][source_slot]["links"].append(number)
        if target == OUTPUTS:
            self.outputs[target_slot]["linkIds"].append(number)
        else:
            self.inside[target]["inputs"][target_slot]["link"] = number

    def show_inputs(self):
        """Give the box the widgets that are to stand on it."""
        by_title = {node["title"]: node for node in self.inside.values()}
        for title, name, label in self.fold.shown:
            node = by_title[title]
            slots = [slot["name"] for slot in node["inputs"]]
            place = slots.index(name)
            index = self._add(self.inputs, label, node["inputs"][place]["type"])
            self._inner(INPUTS, index, node["id"], place, node["inputs"][place]["type"])
            self.shown.append((self.inputs[index]["name"], _value(node, name)))

    def node(self, links):
        """The box itself, in the graph whose links are `links`."""
        incoming = {link[4]: link[0] for link in links if link[3] == self.node_id}
        outgoing = [
            [link[0] for link in links if link[1:3] == [self.node_id, i]] for i in range(len(self.outputs))
        ]
        shown = {name for name, _ in self.shown}
        return {
            "id": self.node_id,
            "type": self.identifier,
            "pos": [0, 0],
            "size": [300, 200],
            "flags": {},
            "order": 0,
            "mode": 0,
            "inputs": [
                {"name": slot["name"], "label": slot["label"], "type": slot["type"], "link": incoming.get(i)}
                | ({"widget": {"name": slot["name"]}} if slot["name"] in shown else {})
                for i, slot in enumerate(self.inputs)
            ],
            "outputs": [
                {"name": slot["name"], "label": slot["label"], "type": slot["type"], "links": outgoing[i]}
                for i, slot in enumerate(self.outputs)
            ],
            "title": self.fold.title,
            "properties": {"proxyWidgets": [["-1", name] for name, _ in self.shown]},
            "widgets_values": [value for _, value in self.shown],
        }

    def definition(self):
        """What lies inside."""
        return {
            "id": self.identifier,
            "version": 1,
            "state": {
                "lastGroupId": 0,
                "lastNodeId": max(self.inside),
                "lastLinkId": self.last_link,
                "lastRerouteId": 0,
            },
            "revision": 0,
            "config": {},
            "name": self.fold.title,
            "description": self.fold.description,
            "inputNode": {"id": INPUTS, "bounding": [-260, 0, 180, 40 + 20 * len(self.inputs)]},
            "outputNode": {"id": OUTPUTS, "bounding": [1200, 0, 120, 40 + 20 * len(self.outputs)]},
            "inputs": self.inputs,
            "outputs": self.outputs,
            "widgets": [],
            "nodes": [*self.inside.values()],
            "groups": [],
            "links": self.links,
            "extra": {"workflowRendererVersion": "LG"},
        }
