"""What a CONDITIONING carries."""

from dataclasses import dataclass

import node_helpers
import torch

from ..wan.config import CLIP_TOKENS, WanConfig

# Keys by which other nodes ask for what our sampler does not do.
UNSUPPORTED = ("area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent")


@dataclass(frozen=True)
class Conditioning:
    """Shapes of one CONDITIONING input; None where a key is absent.

    Attributes:
        name: of the input.
        entries: how many conditionings are listed in it.
        text: [B, L, D].
        image_latent: [B, 16, T, h, w].
        mask: [B, 4, T, h, w].
        clip: CLIP features [B, I, 1280].
        unsupported: keys by which other nodes ask for what our sampler does not do.
    """

    name: str
    entries: int
    text: tuple[int, ...] | None
    image_latent: tuple[int, ...] | None
    mask: tuple[int, ...] | None
    clip: tuple[int, ...] | None
    unsupported: tuple[str, ...] = ()


def describe_conditioning(name: str, conditioning: list) -> Conditioning:
    """Shapes of a CONDITIONING, for the checks."""
    text, options = conditioning[0] if conditioning else (None, {})
    shape = {k: tuple(v.shape) for k, v in options.items() if torch.is_tensor(v)}
    clip = options.get("clip_vision_output")
    return Conditioning(
        name=name,
        entries=len(conditioning),
        text=None if text is None else tuple(text.shape),
        image_latent=shape.get("concat_latent_image"),
        mask=shape.get("concat_mask"),
        clip=None if clip is None else tuple(clip.penultimate_hidden_states.shape),
        unsupported=tuple(key for key in UNSUPPORTED if key in options),
    )


def trim_clip_vision(conditioning: list, config: WanConfig) -> tuple[list, str | None]:
    """The conditioning without the end image's CLIP features, where the model reads the start image's alone.

    Returns:
        (conditioning, a sentence if something was left out)
    """
    clip = describe_conditioning("", conditioning).clip
    if clip is None or config.image_tokens or clip[-2] != 2 * CLIP_TOKENS:
        return conditioning, None
    if config.image_dim is None:
        return conditioning, None
    whole = conditioning[0][1]["clip_vision_output"]
    start = type(whole)()
    start.penultimate_hidden_states = whole.penultimate_hidden_states[:, :CLIP_TOKENS]
    trimmed = node_helpers.conditioning_set_values(conditioning, {"clip_vision_output": start})
    return (
        trimmed,
        "the model reads CLIP features of the start image only; those of the end image are left out",
    )
