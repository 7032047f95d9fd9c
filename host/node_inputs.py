"""What a node's inputs are, from its `INPUT_TYPES`."""

from collections.abc import Iterator, Mapping
from typing import Any

GROUP = "COMFY_DYNAMICCOMBO_V3"  # a choice that brings inputs of its own: `group.setting` in a prompt


def describe_inputs(input_types: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{input name: {"type", "options", "default", "min", "max", ...}}, a group beside its settings."""
    return {
        name: described
        for group in ("required", "optional")
        for one, spec in input_types.get(group, {}).items()
        for name, described in _described(one, spec)
    }


def _described(name: str, spec: tuple[Any, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    kind, options = spec[0], dict(spec[1]) if len(spec) > 1 else {}
    if isinstance(kind, list | tuple):  # a choice as older nodes write it
        yield name, options | {"type": "COMBO", "options": list(kind)}
        return
    if not kind == GROUP:  # noqa: SIM201 (a type of the host that takes anything is unequal to nothing)
        yield name, options | {"type": kind}
        return
    yield name, options | {"type": "COMBO", "options": [option["key"] for option in options["options"]]}
    for option in options["options"]:
        for setting, described in describe_inputs(option["inputs"]).items():
            yield f"{name}.{setting}", described
