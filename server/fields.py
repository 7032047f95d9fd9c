"""The input of the app: one table, from which the JSON Schema, the checks and the graph follow.

Ranges, choices and defaults are those of the node input that a field sets. A field whose node or input
this version of the pack lacks accepts its neutral value only.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model

from ..net.links import check_link
from .problems import invalid

REQUIRED = object()
FROM_NODE = object()
MAX_TEXT = 5000  # a snapshot repeats it, and old clients stop at lines of 128 KiB
MAX_URL = 4096
NONE = "none"
MIN_FRAMES_OF_PAIR = 5

I2V, SAMPLER, LORA = "Wan21ImageToVideo", "Wan21Sampler", "Wan21LoraLoader"
DECODE, TEMPORAL, SPATIAL = "Wan21VAEDecode", "Wan21TemporalUpsample", "Wan21SpatialUpsample"


@dataclass(frozen=True)
class AppField:
    """One field.

    Attributes:
        kind: type of its value in Python.
        default: used when the field is left out; `REQUIRED`, or `FROM_NODE` for the node's.
        node, input: class of the node it sets and the name of the input there, if it is as simple as that.
        neutral: the value that asks for nothing, accepted when the node or the input is missing.
        choices: the values of the node input by those of the field, where they are written otherwise.
        limits: further keywords of pydantic's `Field`.
    """

    name: str
    kind: type
    description: str
    default: Any = FROM_NODE
    node: str | None = None
    input: str | None = None
    neutral: Any = None
    choices: dict | None = None
    limits: dict | None = None


def _text(name, description, default="", **limits):
    return AppField(name, str, description, default, limits={"max_length": MAX_TEXT} | limits)


def _file(name, folder):
    description = f"File in models/{folder}; left out, one that is installed and fits is chosen."
    return AppField(name, str | None, description, None, limits={"max_length": MAX_URL})


FIELDS = (
    _text("prompt", "What happens in the video.", REQUIRED, min_length=1),
    _text(
        "image", "Start image: an uploaded file, or an https URL.", REQUIRED, min_length=1, max_length=MAX_URL
    ),
    AppField("end_image", str | None, "End image, in the same forms.", None, limits={"max_length": MAX_URL}),
    _text(
        "size", "Width and height in pixels, multiples of 16: 832*480 or 832x480.", "832*480", max_length=16
    ),
    AppField("num_frames", int, "Frames, 4n+1, before any upsampling.", node=I2V, input="num_frames"),
    AppField("fps", float, "Frames per second.", 16.0, "CreateVideo", "fps"),
    AppField(
        "guidance_scale",
        float,
        "Weight of the prompt; 1 is fastest.",
        5.0,
        SAMPLER,
        "guidance_scale",
    ),
    AppField("num_inference_steps", int, "Sampling steps.", node=SAMPLER, input="steps"),
    AppField("seed", int, "The same seed gives the same video; -1 draws one.", -1, SAMPLER, "seed"),
    _text("negative_prompt", "What to avoid; empty uses the negative prompt of the Wan2.1 release."),
    AppField("solver", str, "Sampler of the Wan2.1 release.", node=SAMPLER, input="solver"),
    AppField(
        "shift",
        float | None,
        "Shift of the schedule. Left out: 3 up to 832*480 pixels, else 5; 16 for a first-last-frame model.",
        None,
        SAMPLER,
        "flow_shift",
    ),
    AppField(
        "teacache",
        float,
        "Target speed-up of TeaCache, such as 2; 0 is off.",
        node=SAMPLER,
        input="teacache_multiplier",
        neutral=0.0,
    ),
    AppField(
        "teacache_start_percent",
        int,
        "Share of the steps, in percent, before TeaCache begins.",
        node=SAMPLER,
        input="teacache_start_percent",
        neutral=0,
    ),
    AppField(
        "lora_url",
        str,
        "https URL of a LoRA, a .safetensors file.",
        "",
        LORA,
        "lora_url",
        neutral="",
        limits={"max_length": MAX_URL},
    ),
    AppField("lora_multiplier", float, "Strength of the LoRA.", 1.0, LORA, "strength", neutral=1.0),
    AppField(
        "vae_tile_size",
        Literal[0, 128, 256] | None,
        "Pixels of a VAE tile; 0 takes whole frames; left out, tiles are used when memory is short.",
        None,
    ),
    AppField(
        "enable_riflex",
        bool,
        "RIFLEx, against repetition in long clips.",
        False,
        SAMPLER,
        "riflex",
        neutral=False,
        choices={True: "on", False: "off"},
    ),
    AppField(
        "joint_pass",
        bool,
        "Take both passes through each block together; the numbers are the same.",
        node=SAMPLER,
        input="joint_pass",
        neutral=True,
    ),
    AppField("attention", str, "Attention backend.", node=SAMPLER, input="attention", neutral="auto"),
    AppField("cfg_star", bool, "CFG-Zero* guidance.", node=SAMPLER, input="cfg_star", neutral=False),
    AppField(
        "cfg_star_step",
        int,
        "Plain guidance before this step.",
        node=SAMPLER,
        input="cfg_star_start_step",
        neutral=0,
    ),
    AppField(
        "add_frames_for_end_image",
        bool,
        "Give the end image a latent of its own behind the video, for plain image-to-video models.",
        node=I2V,
        input="add_frames_for_end_image",
    ),
    AppField(
        "temporal_upsampling",
        str,
        "More frames a second, by motion-compensated interpolation.",
        NONE,
        TEMPORAL,
        "method",
        neutral=NONE,
    ),
    AppField(
        "spatial_upsampling",
        str,
        "Larger frames; model takes the first file in models/upscale_models.",
        NONE,
        SPATIAL,
        "method",
        neutral=NONE,
    ),
    _file("model", "diffusion_models"),
    _file("text_encoder", "text_encoders"),
    _file("vae", "vae"),
    _file("clip_vision", "clip_vision"),
)
NODES = tuple(dict.fromkeys(field.node for field in FIELDS if field.node))
SIZE = re.compile(r"(\d{1,5})[*x](\d{1,5})")


def build_input_model(node_inputs):
    """Return the pydantic model of the app's input.

    Args:
        node_inputs: node class -> {input name: {"type", "min", "max", "options", "default"}}, or None.
    """
    fields = {field.name: _definition(field, node_inputs) for field in FIELDS}
    return create_model("Wan21I2VInput", __config__=ConfigDict(extra="forbid", strict=True), **fields)


def available(field, node_inputs):
    """Whether the host has the node and the input that a field sets."""
    return field.node is None or (node_inputs(field.node) or {}).get(field.input) is not None


def read_input(model, data):
    """Return the checked input.

    Raises:
        Problem: 422 with a path and a message for each wrong or unknown field.
    """
    if not isinstance(data, dict):
        raise invalid(("", "must be an object with at least prompt and image"))
    try:
        checked = model.model_validate(data)
    except ValidationError as error:
        raise invalid(*_complaints(error)) from None
    if checked.end_image and checked.num_frames < MIN_FRAMES_OF_PAIR:
        raise invalid(("num_frames", f"must be at least {MIN_FRAMES_OF_PAIR} with an end image"))
    if checked.add_frames_for_end_image and not checked.end_image:
        raise invalid(("add_frames_for_end_image", "is for an end image, and there is none"))
    return checked


def _complaints(error):
    """(field, message) pairs; a choice that fails in several ways is told once."""
    found = {}
    for problem in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(problem["loc"][0])
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            text = "unknown field"
        found.setdefault(name, text)
    return found.items()


def _definition(field, node_inputs):
    spec = (node_inputs(field.node) or {}).get(field.input) if field.node else {}
    if spec is None:
        return _unavailable(field)
    default = spec.get("default") if field.default is FROM_NODE else field.default
    if default is None and field.default is FROM_NODE and spec.get("options"):
        default = spec["options"][0]
    limits = dict(field.limits or {})
    limits |= {limit: spec[name] for limit, name in (("ge", "min"), ("le", "max")) if name in spec}
    kind, checks = field.kind, []
    if field.choices is None and spec.get("options"):
        neutral = [] if field.neutral is None else [field.neutral]
        kind = Literal[tuple(dict.fromkeys([*neutral, *spec["options"]]))]
    if field.name == "num_frames":
        checks.append(AfterValidator(_check_num_frames))
        limits["json_schema_extra"] = {"description": f"{field.description} One of 1, 5, 9, ..."}
    if field.name == "lora_url":
        checks.append(AfterValidator(_check_lora_url))
    if field.name == "size":
        sides = node_inputs(I2V)
        checks.append(AfterValidator(lambda text: _check_size(text, sides)))
    info = Field(... if default is REQUIRED else default, description=field.description, **limits)
    return (Annotated[kind, checks[0]] if checks else kind), info


def _unavailable(field):
    def check(value):
        if value != field.neutral:
            raise ValueError(f"not available in this version; leave it out, or at {field.neutral!r}")
        return value

    extra = {"const": field.neutral}
    description = f"{field.description} Not available in this version."
    return (
        Annotated[field.kind, AfterValidator(check)],
        Field(field.neutral, description=description, json_schema_extra=extra),
    )


def parse_size(text):
    """Return (width, height) of "832*480" or "832x480"."""
    found = SIZE.fullmatch(text)
    if found is None:
        raise ValueError("must be width*height in pixels, such as 832*480")
    return int(found[1]), int(found[2])


def _check_size(text, inputs):
    for name, value in zip(("width", "height"), parse_size(text)):
        low, high, step = (inputs[name][key] for key in ("min", "max", "step"))
        if not low <= value <= high or value % step:
            raise ValueError(f"{name} is {value}; it must be a multiple of {step} from {low} to {high}")
    return text


def _check_lora_url(url):
    if url:
        check_link(url)
    return url


def _check_num_frames(value):
    if value % 4 != 1:
        raise ValueError(f"is {value}; it must be 4n+1, such as {max(1, value - (value - 1) % 4)}")
    return value
