"""The app's input as a pydantic model, made of the table in `fields` and of the host's nodes.

Ranges, choices and defaults are those of the node input that a field sets. A field whose node or input
this version of the pack lacks accepts its neutral value only.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
)

from .fields import FIELDS, FROM_NODE, REQUIRED, TILES, AppField, Check, NodeInputs, available
from .graph import KNOWN_FRAMES
from .problems import invalid

MIN_FRAMES_OF_PAIR = 5
WHOLE = (int, TILES)  # kinds whose values may come as 30.0


def build_input_model(node_inputs: NodeInputs) -> type[BaseModel]:
    """The pydantic model of the app's input, on a host with these nodes.

    Args:
        node_inputs: node class -> {input name: {"type", "min", "max", "options", "default"}}, or None.
    """
    definitions: dict[str, Any] = {row.name: _definition(row, node_inputs) for row in FIELDS}
    return create_model("Wan21I2VInput", __config__=ConfigDict(extra="forbid", strict=True), **definitions)


def read_input(model: type[BaseModel], data: object) -> dict[str, Any]:
    """The checked input, by field.

    Raises:
        Problem: 422 with a path and a message for each wrong or unknown field.
    """
    if not isinstance(data, dict):
        raise invalid(("", "must be an object with at least prompt and image"))
    try:
        values = model.model_validate(data).model_dump()
    except ValidationError as error:
        raise invalid(*_complaints(error)) from None
    if values["end_image"] and values["num_frames"] < MIN_FRAMES_OF_PAIR:
        raise invalid(("num_frames", f"must be at least {MIN_FRAMES_OF_PAIR} with an end image"))
    if values["add_frames_for_end_image"] and not values["end_image"]:
        raise invalid(("add_frames_for_end_image", "is for an end image, and there is none"))
    if values["segments"] and values["end_image"]:
        raise invalid(("end_image", "is for a video of one segment; leave it or segments out"))
    if values["segments"] and values["num_frames"] <= KNOWN_FRAMES:
        raise invalid(("num_frames", f"must be at least {KNOWN_FRAMES + 4} with segments"))
    return values


def _complaints(error: ValidationError) -> Iterable[tuple[str, str]]:
    """(field, message) pairs; a choice that fails in several ways is told once."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        unknown = problem["type"] == "extra_forbidden"
        text = "unknown field" if unknown else problem["msg"].removeprefix("Value error, ")
        found.setdefault(str(problem["loc"][0]), text)
    return found.items()


def _definition(row: AppField, node_inputs: NodeInputs) -> tuple[Any, Any]:
    """Type and pydantic `Field` of one field."""
    if not available(row, node_inputs):
        return _unavailable(row)
    spec = (node_inputs(row.node) or {})[row.input] if row.node and row.input else {}
    kind = row.kind
    if spec.get("options") and row.choices is None:
        neutral = [] if row.neutral is None else [row.neutral]
        kind = Literal[tuple(dict.fromkeys([*neutral, *spec["options"]]))]
    if row.kind in WHOLE:
        kind = Annotated[kind, BeforeValidator(_whole)]
    if row.check is not None:
        kind = Annotated[kind, AfterValidator(_validator(row.check, node_inputs))]
    ranges = {limit: spec[name] for limit, name in (("ge", "min"), ("le", "max")) if name in spec}
    if "ge" in ranges and isinstance(row.neutral, int | float):
        ranges["ge"] = min(ranges["ge"], row.neutral)
    return kind, Field(_default(row, spec), description=row.description, **row.limits, **ranges)


def _whole(value: Any) -> Any:
    """30.0 is an integer in JSON, as 30 is, and false is not 0; the rest is checked by its kind.

    Raises:
        ValueError: a truth value.
    """
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _default(row: AppField, spec: Mapping[str, Any]) -> Any:
    if row.default is REQUIRED:
        return ...
    if row.default is not FROM_NODE:
        return row.default
    options = spec.get("options") or [None]
    return options[0] if spec.get("default") is None else spec["default"]


def _validator(check: Check, node_inputs: NodeInputs) -> Callable[[Any], Any]:
    def validate(value: Any) -> Any:
        check(value, node_inputs)
        return value

    return validate


def _unavailable(row: AppField) -> tuple[Any, Any]:
    """Type and pydantic `Field` of a field that accepts its neutral value only."""

    def validate(value: Any) -> Any:
        if value != row.neutral:
            raise ValueError(f"not available in this version; leave it out, or at {row.neutral!r}")
        return value

    description = f"{row.description} Not available in this version."
    extra = {"const": row.neutral}
    kind = Annotated[row.kind, AfterValidator(validate)]
    return kind, Field(row.neutral, description=description, json_schema_extra=extra)
