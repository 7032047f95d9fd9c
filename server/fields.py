"""The fields of the app's input: one table, from which the JSON Schema, the checks and the graph follow."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from ..net.links import check_link

NodeInputs = Callable[[str], Mapping[str, Mapping[str, Any]] | None]  # node class -> {input: description}
Check = Callable[[Any, NodeInputs], object]

REQUIRED = object()
FROM_NODE = object()
MAX_TEXT = 5000  # a snapshot repeats it, and old clients stop at lines of 128 KiB
MAX_URL = 4096
MAX_SEGMENTS = 16  # of one video, the first included
NONE = "none"
SIZE = re.compile(r"([0-9]{1,5})[*x]([0-9]{1,5})")
TILES = Literal[0, 128, 256] | None

I2V, SAMPLER, LORA = "Wan21ImageToVideo", "Wan21Sampler", "Wan21LoraLoader"
DECODE, JOIN = "Wan21VAEDecode", "Wan21JoinClips"
TEMPORAL, SPATIAL = "Wan21TemporalUpsample", "Wan21SpatialUpsample"


@dataclass(frozen=True, kw_only=True)
class AppField:
    """One field.

    Attributes:
        kind: type of its value in Python.
        default: used when the field is left out; `REQUIRED`, or `FROM_NODE` for the node's.
        node, input: class of the node it sets, and the name of the input; None where `graph` sets more than
            one input.
        neutral: value that asks for nothing, accepted when the host lacks the node or the input, and outside
            the limits of the input.
        choices: field's value -> node's value, where the two are written differently.
        limits: further keywords of pydantic's `Field`.
        check: raises `ValueError` for a wrong value of the right type and range; called with the value and
            the inputs of the host's nodes.
    """

    name: str
    kind: Any
    description: str
    default: Any = FROM_NODE
    node: str | None = None
    input: str | None = None
    neutral: Any = None
    choices: Mapping[Any, str] | None = None
    limits: Mapping[str, Any] = field(default_factory=dict)
    check: Check | None = None


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "832*480" or "832x480".

    Raises:
        ValueError: the text is of another form.
    """
    found = SIZE.fullmatch(text)
    if found is None:
        raise ValueError("must be width*height in pixels, such as 832*480")
    return int(found[1]), int(found[2])


def _check_size(text: str, node_inputs: NodeInputs) -> None:
    inputs = node_inputs(I2V) or {}
    for name, value in zip(("width", "height"), parse_size(text)):
        low, high, step = (inputs[name][key] for key in ("min", "max", "step"))
        if not low <= value <= high or value % step:
            raise ValueError(f"{name} is {value}; it must be a multiple of {step} from {low} to {high}")


def _check_num_frames(value: int, _: NodeInputs) -> None:
    if value % 4 != 1:
        raise ValueError(f"is {value}; it must be 4n+1, such as {max(1, value - (value - 1) % 4)}")


def _check_teacache(value: float, _: NodeInputs) -> None:
    if 0 < value < 1:
        raise ValueError(f"is {value:g}; a speed-up is at least 1, and 0 is off")


def _check_lora_url(url: str, _: NodeInputs) -> None:
    if url:
        check_link(url)


def _check_segments(texts: list[str], _: NodeInputs) -> None:
    length = sum(map(len, texts))
    if length > MAX_TEXT:
        raise ValueError(f"have {length} characters together; the most is {MAX_TEXT}")


def _model_file(part: str, folder: str) -> AppField:
    return AppField(
        name=part,
        kind=str | None,
        description=f"File in models/{folder}; left out, one that is installed and fits is chosen.",
        default=None,
        limits={"max_length": MAX_URL},
    )


FIELDS = (
    AppField(
        name="prompt",
        kind=str,
        description="What happens in the video.",
        default=REQUIRED,
        limits={"min_length": 1, "max_length": MAX_TEXT},
    ),
    AppField(
        name="segments",
        kind=list[Annotated[str, Field(min_length=1)]],
        description="Prompts of what happens after that, in one video: each segment has num_frames frames "
        "and goes on from the last 5 of the one before.",
        default=[],
        limits={"max_length": MAX_SEGMENTS - 1},
        check=_check_segments,
    ),
    AppField(
        name="image",
        kind=str,
        description="Start image: an uploaded file, or an https URL.",
        default=REQUIRED,
        limits={"min_length": 1, "max_length": MAX_URL},
    ),
    AppField(
        name="end_image",
        kind=str | None,
        description="End image, in the same forms.",
        default=None,
        limits={"max_length": MAX_URL},
    ),
    AppField(
        name="size",
        kind=str,
        description="Width and height in pixels, multiples of 8: 832*480 or 832x480.",
        default="832*480",
        limits={"max_length": 16, "json_schema_extra": {"pattern": f"^{SIZE.pattern}$"}},
        check=_check_size,
    ),
    AppField(
        name="num_frames",
        kind=int,
        description="Frames, 4n+1, before any upsampling. One of 1, 5, 9, ...",
        node=I2V,
        input="num_frames",
        check=_check_num_frames,
    ),
    AppField(
        name="fps",
        kind=float,
        description="Frames per second.",
        default=16.0,
        node="CreateVideo",
        input="fps",
    ),
    AppField(
        name="guidance_scale",
        kind=float,
        description="Weight of the prompt; 1 is fastest.",
        default=5.0,
        node=SAMPLER,
        input="guidance_scale",
    ),
    AppField(
        name="num_inference_steps",
        kind=int,
        description="Sampling steps.",
        node=SAMPLER,
        input="steps",
    ),
    AppField(
        name="seed",
        kind=int,
        description="The same seed gives the same video; -1 draws one.",
        default=-1,
        node=SAMPLER,
        input="seed",
    ),
    AppField(
        name="negative_prompt",
        kind=str,
        description="What to avoid; empty uses the negative prompt of the Wan2.1 release.",
        default="",
        limits={"max_length": MAX_TEXT},
    ),
    AppField(
        name="solver",
        kind=str,
        description="Sampler of the Wan2.1 release.",
        node=SAMPLER,
        input="solver",
    ),
    AppField(
        name="shift",
        kind=float | None,
        description="Shift of the schedule. Left out: 3 up to 832*480 pixels, else 5; 16 for a "
        "first-last-frame model.",
        default=None,
        node=SAMPLER,
        input="flow_shift",
    ),
    AppField(
        name="teacache",
        kind=float,
        description="Target speed-up of TeaCache, such as 2; 0 is off.",
        default=0.0,
        node=SAMPLER,
        input="cache.multiplier",
        neutral=0.0,
        limits={"json_schema_extra": {"anyOf": [{"const": 0}, {"minimum": 1}]}},
        check=_check_teacache,
    ),
    AppField(
        name="teacache_start_percent",
        kind=int,
        description="Share of the steps, in percent, before TeaCache begins.",
        node=SAMPLER,
        input="cache.start_percent",
        neutral=0,
    ),
    AppField(
        name="lora_url",
        kind=str,
        description="https URL of a LoRA, a .safetensors file.",
        default="",
        node=LORA,
        input="lora_url",
        neutral="",
        limits={"max_length": MAX_URL},
        check=_check_lora_url,
    ),
    AppField(
        name="lora_multiplier",
        kind=float,
        description="Strength of the LoRA.",
        default=1.0,
        node=LORA,
        input="strength",
        neutral=1.0,
    ),
    AppField(
        name="vae_tile_size",
        kind=TILES,
        description="Pixels of a VAE tile; 0 takes whole frames; left out, tiles are used when memory is "
        "short.",
        default=None,
    ),
    AppField(
        name="enable_riflex",
        kind=bool,
        description="RIFLEx, against repetition in long clips.",
        default=False,
        node=SAMPLER,
        input="riflex",
        neutral=False,
        choices={True: "on", False: "off"},
    ),
    AppField(
        name="joint_pass",
        kind=bool,
        description="Take both passes through each block together; the numbers are the same.",
        node=SAMPLER,
        input="execution.joint_pass",
        neutral=True,
    ),
    AppField(
        name="attention",
        kind=str,
        description="Attention backend.",
        node=SAMPLER,
        input="execution.attention",
        neutral="auto",
    ),
    AppField(
        name="cfg_star",
        kind=bool,
        description="CFG-Zero* guidance.",
        default=False,
        node=SAMPLER,
        input="cfg_star",
        neutral=False,
        choices={True: "on", False: "off"},
    ),
    AppField(
        name="cfg_star_step",
        kind=int,
        description="Plain guidance before this step.",
        node=SAMPLER,
        input="cfg_star.start_step",
        neutral=0,
    ),
    AppField(
        name="add_frames_for_end_image",
        kind=bool,
        description="Give the end image a latent of its own behind the video, for plain image-to-video "
        "models.",
        node=I2V,
        input="add_frames_for_end_image",
    ),
    AppField(
        name="temporal_upsampling",
        kind=str,
        description="More frames a second, by motion-compensated interpolation.",
        default=NONE,
        node=TEMPORAL,
        input="method",
        neutral=NONE,
    ),
    AppField(
        name="spatial_upsampling",
        kind=str,
        description="Larger frames; model takes the first file in models/upscale_models.",
        default=NONE,
        node=SPATIAL,
        input="method",
        neutral=NONE,
    ),
    _model_file("model", "diffusion_models"),
    _model_file("text_encoder", "text_encoders"),
    _model_file("vae", "vae"),
    _model_file("clip_vision", "clip_vision"),
)
# Group of the sampler's inputs -> (off, on, the fields that switch it on when they are not neutral).
GROUPS = {
    "cache": ("off", "teacache", ("teacache",)),
    "cfg_star": ("off", "on", ("cfg_star",)),
    "execution": ("auto", "custom", ("joint_pass", "attention")),
}
NODES = tuple(dict.fromkeys(row.node for row in FIELDS if row.node))


def available(row: AppField, node_inputs: NodeInputs) -> bool:
    """Whether the host has the node and the input that a field sets."""
    return row.node is None or row.input in (node_inputs(row.node) or {})
