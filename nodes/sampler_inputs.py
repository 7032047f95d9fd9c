"""The sampler's inputs in groups, and what they ask for."""

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from .. import host
from ..wan.backends import CHOICES
from ..wan.config import VAE_STRIDE
from ..wan.guidance import CfgZeroStar, ZeroInit
from ..wan.nag import Nag
from ..wan.option import Option
from ..wan.refusal import Refusal
from ..wan.riflex import MODES, Riflex
from ..wan.sigmas import StepRange
from ..wan.skip_layer import SkipLayers, parse_layers
from ..wan.teacache import PROFILES, Profile, TeaCache, choose_profile

Group = (
    Mapping[str, Any] | None
)  # what the host hands for a group: its own name -> the choice, and the settings
ENABLE = ["enable", "disable"]
LAST_STEP = 10000


def _group(name: str, tooltip: str, off: str, on: str, inputs: list[Any]) -> Any:
    options = [io.DynamicCombo.Option(off, []), io.DynamicCombo.Option(on, inputs)]
    return io.DynamicCombo.Input(name, options=options, optional=True, tooltip=tooltip)


def _percent(name: str, default: int, tooltip: str) -> Any:
    return io.Int.Input(name, default=default, min=0, max=100, optional=True, tooltip=tooltip)


def option_inputs() -> list[Any]:
    """The inputs behind the first ten: each is optional, and its default leaves the numbers alone."""
    return [
        _group(
            "cache",
            "TeaCache: steps that change little reuse what an earlier one made.",
            "off",
            "teacache",
            [
                io.Float.Input(
                    "multiplier",
                    default=2.0,
                    min=1.0,
                    max=10.0,
                    step=0.05,
                    optional=True,
                    tooltip="Target speed-up; 1.5 to 2.5 is usual. The report shows the computed steps.",
                ),
                _percent(
                    "start_percent",
                    0,
                    "The first steps, of this share, are all computed; higher keeps more of the motion.",
                ),
                io.Combo.Input(
                    "profile",
                    options=list(PROFILES),
                    default="auto",
                    optional=True,
                    tooltip="Coefficients. auto takes those of the checkpoint itself, or chooses by model, "
                    "file name and size; measured are those of scripts/calibrate_teacache.py.",
                ),
            ],
        ),
        _group(
            "cfg_star",
            "CFG-Zero*: scales the negative pass to fit the positive one before they are combined.",
            "off",
            "on",
            [
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="Plain guidance before this step, counted from 0.",
                ),
                io.Int.Input(
                    "zero_init_steps",
                    default=0,
                    min=0,
                    max=1000,
                    optional=True,
                    tooltip="In the first steps of this number the latent is left as it is. 0 is off; the "
                    "authors use 1 for image-to-video.",
                ),
            ],
        ),
        _group(
            "nag",
            "Normalized attention guidance: the negative prompt acts in cross-attention, also at guidance 1.",
            "off",
            "on",
            [
                io.Float.Input(
                    "scale", default=11.0, min=1.0, max=100.0, step=0.1, optional=True, tooltip="1 is none."
                ),
                io.Float.Input(
                    "tau",
                    default=2.5,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    optional=True,
                    tooltip="The most that a token may grow by; lower is calmer.",
                ),
                io.Float.Input(
                    "alpha",
                    default=0.25,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of the guided result.",
                ),
            ],
        ),
        _group(
            "skip_layers",
            "Skip-layer guidance: the negative pass leaves blocks out, and guidance leads away from it.",
            "off",
            "on",
            [
                io.String.Input(
                    "layers", default="9", optional=True, tooltip="Numbers of blocks, such as 9 or 9,10."
                ),
                _percent("start_percent", 10, "The blocks are left out from here on."),
                _percent("end_percent", 90, "The blocks are left out up to here."),
            ],
        ),
        io.Combo.Input(
            "riflex",
            options=list(MODES),
            default="off",
            optional=True,
            tooltip="RIFLEx, against repetition in long clips. It changes nothing below 181 frames; from "
            "there on auto and on are the same.",
        ),
        _group(
            "step_range",
            "Only a part of the steps, as in KSamplerAdvanced.",
            "all",
            "part",
            [
                io.Int.Input(
                    "start_at_step", default=0, min=0, max=LAST_STEP, optional=True, tooltip="Counted from 0."
                ),
                io.Int.Input(
                    "end_at_step",
                    default=LAST_STEP,
                    min=0,
                    max=LAST_STEP,
                    optional=True,
                    tooltip="Past the last step it is the end.",
                ),
                io.Combo.Input(
                    "add_noise",
                    options=ENABLE,
                    default="enable",
                    optional=True,
                    tooltip="disable: the latent carries its noise from an earlier part.",
                ),
                io.Combo.Input(
                    "return_with_leftover_noise",
                    options=ENABLE[::-1],
                    default="disable",
                    optional=True,
                    tooltip="enable: a later part goes on from here.",
                ),
            ],
        ),
        _group(
            "execution",
            "How a step is carried out; but for rounding the numbers are the same.",
            "auto",
            "custom",
            [
                io.Boolean.Input(
                    "joint_pass",
                    default=True,
                    optional=True,
                    tooltip="Both passes go through each block before the next one. Off takes less memory.",
                ),
                io.Combo.Input(
                    "attention",
                    options=list(CHOICES),
                    default="auto",
                    optional=True,
                    tooltip="auto takes an installed exact one (flash, flash3, flash4, xformers) that is "
                    "15 % faster than sdpa here. sage and kitchen are quantised, and taken when named.",
                ),
            ],
        ),
        io.Model.Input(
            "model_low_noise",
            optional=True,
            tooltip="The second expert of Wan2.2, for the steps of low noise; model is then the first.",
        ),
        io.Float.Input(
            "expert_boundary",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.001,
            optional=True,
            force_input=True,
            tooltip="The second expert has the steps whose timestep is below 1000 times this. 0, or nothing "
            "connected: the release's, 0.9 for image to video and 0.875 for text to video.",
        ),
        io.Float.Input(
            "low_noise_guidance_scale",
            default=0.0,
            min=0.0,
            max=100.0,
            step=0.1,
            optional=True,
            force_input=True,
            tooltip="guidance_scale of the second expert; 0, or nothing connected: the same.",
        ),
        io.Sigmas.Input(
            "sigmas",
            optional=True,
            tooltip="A schedule of a scheduler node, in place of steps, flow_shift and denoise.",
        ),
    ]


def settings(group: Group, name: str) -> dict[str, Any] | None:
    """What is set in a group that is on; None where it is off. What a prompt leaves out has its default."""
    if not group or group.get(name) in (None, "off", "all", "auto"):
        return None
    return {key: value for key, value in group.items() if key != name and value is not None}


def options_of(
    model: host.ModelPatcher,
    shape: tuple[int, ...],
    *,
    cache: Group = None,
    cfg_star: Group = None,
    nag: Group = None,
    skip_layers: Group = None,
    riflex: str = "off",
) -> tuple[Option, ...]:
    """The options that the node's inputs turn on, in the order in which they act.

    Args:
        model: a MODEL of ours.
        shape: of the latent, [B, 16, T, h, w].

    Raises:
        Refusal: an input cannot be read, or there are no TeaCache coefficients for the model.
    """
    options: list[Option] = []
    if riflex != "off":
        options.append(Riflex(riflex))
    if (star := settings(cfg_star, "cfg_star")) is not None:
        if zero := star.get("zero_init_steps"):
            options.append(ZeroInit(zero))
        options.append(CfgZeroStar(star.get("start_step", 0)))
    if (values := settings(nag, "nag")) is not None:
        options.append(Nag(**values))
    if (skip := settings(skip_layers, "skip_layers")) is not None:
        layers = parse_layers(skip.pop("layers", "9"))
        if not layers:
            raise Refusal("skip_layers.layers is empty; it takes block numbers", "Write them like 9,10")
        options.append(SkipLayers(layers, **skip))
    if (tea := settings(cache, "cache")) is not None:
        multiplier = tea.get("multiplier", 2.0)
        if multiplier != 1:
            profile = profile_of(model, shape, tea.get("profile", "auto")) if multiplier > 1 else None
            options.append(TeaCache(multiplier, tea.get("start_percent", 0), profile))
    return tuple(options)


def step_range_of(group: Group) -> StepRange:
    """The part of the schedule that is asked for."""
    part = settings(group, "step_range") or {}
    flags = {
        name: part.pop(name) == "enable"
        for name in ("add_noise", "return_with_leftover_noise")
        if name in part
    }
    return StepRange(**part, **flags)


def execution_of(group: Group) -> tuple[bool, str]:
    """(whether passes go through each block together, the name of the attention)."""
    chosen = settings(group, "execution") or {}
    return chosen.get("joint_pass", True), chosen.get("attention", "auto")


def profile_of(model: host.ModelPatcher, shape: tuple[int, ...], name: str) -> Profile:
    """The TeaCache coefficients of a MODEL for a latent of this shape."""
    pixels = shape[-2] * shape[-1] * VAE_STRIDE[1] * VAE_STRIDE[2]
    measured = host.measured_coefficients(model)
    return choose_profile(name, host.config_of(model), host.checkpoint_name(model), pixels, measured)


def check_names(given: Mapping[str, Any], inputs: list[Any]) -> None:
    """Refuses inputs and choices that the node does not have, which the host would drop without a word.

    Args:
        given: inputs of the node in the prompt.
        inputs: those of its schema.

    Raises:
        Refusal: with those that there are.
    """
    known = {one.id for one in inputs}
    groups = {one.id: one.options for one in inputs if isinstance(one, io.DynamicCombo.Input)}
    for name, value in given.items():
        group, _, setting = name.partition(".")
        if name in groups:
            keys = [option.key for option in groups[name]]
            if value not in keys:
                raise Refusal(
                    f"{name} is {value!r}; it is one of {', '.join(keys)}", f"Choose one, {name!r} is a group"
                )
        elif group in groups and setting:
            names = [one.id for option in groups[group] for one in option.inputs]
            if setting not in names:
                raise Refusal(f"there is no input {name}", f"{group} has {', '.join(names)}")
        elif name not in known:
            raise Refusal(
                f"there is no input {name}",
                "Settings of an option stand in its group, such as cache.multiplier: see the help page",
            )
