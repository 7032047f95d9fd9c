"""What a CONDITIONING carries."""

from dataclasses import dataclass
from typing import Any

import node_helpers
import torch

from ..wan.config import CLIP_TOKENS, WanConfig
from ..wan.refusal import Refusal
from .guide import GUIDE

# Keys by which other nodes ask for what our sampler does not do.
UNSUPPORTED = (
    "area", "mask", "control", "gligen", "hooks", "start_percent", "end_percent", "context_latents",
)  # fmt: skip
NEUTRAL = {"start_percent": 0.0, "end_percent": 1.0, "context_latents": []}
# Keys that are read, by the host's Wan2.1 and by our sampler.
READ = (
    "concat_latent_image",
    "concat_mask",
    "concat_mask_index",
    "clip_vision_output",
    "time_dim_concat",
    GUIDE,
)
# Keys of the host's own that say nothing to a Wan2.1 model.
OF_HOST = (
    "pooled_output", "attention_mask", "strength", "mask_strength", "set_area_to_bounds", "default", "uuid",
    "clip_start_percent", "clip_end_percent",
)  # fmt: skip


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
        unread: keys of other nodes that no Wan2.1 model of this kind reads, the host's neither.
        frames_beside: latent frames that the model reads behind the video's and does not denoise.
    """

    name: str
    entries: int
    text: tuple[int, ...] | None
    image_latent: tuple[int, ...] | None
    mask: tuple[int, ...] | None
    clip: tuple[int, ...] | None
    unsupported: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    frames_beside: int = 0


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
        unsupported=tuple(k for k in UNSUPPORTED if options.get(k) not in (None, NEUTRAL.get(k))),
        unread=tuple(
            k for k in options if k not in (*UNSUPPORTED, *READ, *OF_HOST) and options[k] is not None
        ),
        frames_beside=shape["time_dim_concat"][2] if "time_dim_concat" in shape else 0,
    )


def not_finite(conditioning: list) -> list[str]:
    """What of a CONDITIONING holds NaN or infinite numbers: "text", "image", "CLIP vision"."""
    text, options = conditioning[0] if conditioning else (None, {})
    clip = options.get("clip_vision_output")
    parts = {
        "text": text,
        "image": options.get("concat_latent_image"),
        "CLIP vision": None if clip is None else clip.penultimate_hidden_states,
    }
    return [name for name, part in parts.items() if part is not None and not torch.isfinite(part).all()]


def trim_clip_vision(conditioning: list, config: WanConfig) -> tuple[list, str | None]:
    """The conditioning without CLIP features of more images than the model reads: the first, or two.

    Returns:
        (conditioning, a sentence if something was left out)
    """
    clip = describe_conditioning("", conditioning).clip
    read = config.image_tokens or CLIP_TOKENS
    if clip is None or config.image_dim is None or clip[-2] <= read or clip[-2] % CLIP_TOKENS:
        return conditioning, None
    whole = conditioning[0][1]["clip_vision_output"]
    first = type(whole)()
    first.penultimate_hidden_states = whole.penultimate_hidden_states[:, :read]
    trimmed = node_helpers.conditioning_set_values(conditioning, {"clip_vision_output": first})
    which = "two images only; those of the others"
    if not config.image_tokens:
        which = "the start image only; those of the end image"
    return trimmed, f"the model reads CLIP features of {which} are left out"


def refuse_more_features(config: WanConfig, clip: Any) -> None:
    """Refuses a CLIP_VISION_OUTPUT with more features than a first-last-frame model has places for.

    The host's reads the first of the text's features in place of those that it cuts off.

    Raises:
        Refusal: there are more.
    """
    tokens = 0 if clip is None else clip.penultimate_hidden_states.shape[-2]
    if config.image_tokens and tokens > config.image_tokens:
        raise Refusal(
            f"the conditioning has CLIP vision features of {tokens} tokens, and a first-last-frame model has "
            f"places for {config.image_tokens}, those of two images",
            "Connect the features of the start and the end image alone",
        )


def missing_clip_vision(config: WanConfig, clip: Any) -> str | None:
    """What is said where a model has an image branch and a conditioning nothing for it to read.

    A model of `empty_start`, which no release is, was trained so.
    """
    if clip is not None or config.image_dim is None or config.empty_start:
        return None
    return (
        "without CLIP vision features the model's image branch reads the text, as with ComfyUI's own loader; "
        "diffusers leaves it out, and gives another video"
    )
