"""Which model files belong together, and which of several come first.

A diffusion model reads the features of one text encoder and works on the latents of one VAE. For the encoder
the widths decide. Latents do not show which VAE they are of, but sizes do: the release's models read umT5-XXL
and have one VAE; small models come with a small encoder and a small VAE of their own.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .traits import Traits

PARTNERS = ("text_encoder", "vae", "clip_vision")
RELEASE_TEXT_WIDTH = 4096  # of umT5-XXL
RELEASE_VAE_DIMS = (96, 24)  # the release's own, and LightX2V's, which is pruned and has the same latents
# What only names tell of a model: few steps without guidance, and the size of video it was trained for.
DISTILLED_NAME = re.compile(
    r"light(x2v|ning)|distil|causvid|accvid|fastwan|turbo|(?<!\d)[2468][_-]?steps?", re.I
)
SIZE_NAME = re.compile(r"(?<!\d)(480|720)p?(?!\d)", re.I)
CLIP_NAMES = ("vision_h", "vit-h", "vit_h")  # as the release's image encoder is named where it is published


class File(NamedTuple):
    """One installed file.

    Attributes:
        name: as the host lists it.
        bundled: whether this pack brings it.
        preferred: whether the graph names it.
    """

    name: str
    traits: Traits
    bundled: bool = False
    preferred: bool = False

    @property
    def is_release(self) -> bool:
        """Whether a model is made for the release's text encoder and VAE."""
        return self.traits.text_width == RELEASE_TEXT_WIDTH

    @property
    def is_expert(self) -> bool:
        """Whether a model has no image branch, as the two experts of Wan2.2, of which a job needs both."""
        return self.is_release and self.traits.image_width is None

    @property
    def is_distilled(self) -> bool:
        """Whether a model is named as one of few steps without guidance."""
        return self.is_release and DISTILLED_NAME.search(self.name) is not None

    def is_for(self, large: bool) -> bool:
        """Whether the name leaves it open, or says, that a model is for videos of this size.

        Args:
            large: of more pixels than 832x480.
        """
        sizes = set(SIZE_NAME.findall(self.name)) if self.is_release else ()
        return not sizes or ("720" if large else "480") in sizes


class Offer(NamedTuple):
    """What there is for one part.

    Attributes:
        files: those that would load; where the client names a file, that one.
        refused: those that are meant for the part and would not load.
        named: whether the client names the file.
    """

    files: Sequence[File]
    refused: Sequence[File] = ()
    named: bool = False


class ModelSet(NamedTuple):
    """Files that belong together, or what hinders that.

    Attributes:
        files: by part, clip_vision only where there is one to be used; empty where no set is complete.
        lacking: the models that came first and were passed over, with the parts that no file fits.
    """

    files: dict[str, File]
    lacking: dict[File, list[str]]


def choose_set(offers: Mapping[str, Offer], end_image: bool, large: bool) -> ModelSet:
    """The first model that has a file for every part, and the first that fits of each part.

    Args:
        offers: by part, "model" and those of `PARTNERS`.
        end_image: whether a first-last-frame model comes first.
        large: whether the video has more pixels than 832x480.
    """
    lacking: dict[File, list[str]] = {}
    for model in sorted(offers["model"].files, key=lambda file: _model_rank(file, end_image, large)):
        fits = {part: fitting(model, part, offers[part]) for part in PARTNERS}
        lacking[model] = [part for part in PARTNERS if not fits[part] and _is_needed(part, offers[part])]
        if not lacking[model]:
            del lacking[model]
            partners = {part: files[0] for part, files in fits.items() if files}
            return ModelSet({"model": model} | partners, lacking)
    return ModelSet({}, lacking)


def fitting(model: File, part: str, offer: Offer) -> list[File]:
    """The files of a part that go with a model, best first; no image encoder that it would not read."""
    if part == "clip_vision" and model.traits.image_width is None and not offer.named:
        return []
    files = [file for file in offer.files if belongs(model, part, file)]
    return sorted(files, key=lambda file: _partner_rank(model, part, file))


def belongs(model: File, part: str, file: File) -> bool:
    """Whether a file of a part goes with a model, as far as sizes tell."""
    own, other = model.traits, file.traits
    if part == "text_encoder":
        return own.text_width == other.text_width
    if part == "vae":
        return model.is_release == (other.vae_dim in RELEASE_VAE_DIMS)
    return None in (own.image_width, other.image_width) or own.image_width == other.image_width


def _is_needed(part: str, offer: Offer) -> bool:
    return part != "clip_vision" or offer.named


def _model_rank(file: File, end_image: bool, large: bool) -> tuple:
    """Whole models for the images at hand, other whole ones, the bundled one, ones with additions, experts.

    A model trained for additions that are not used, such as a dancer's poses, gives less than a plain one.
    Of experts those for low noise come first: alone, only these come to a clear picture. Among equals those
    come last that are made for few steps, which the job does not take by itself, or for another size.
    """
    if file.is_expert:
        tier = 4 if "low" in file.name.lower() else 5
    elif file.traits.has_addition:
        tier = 3
    elif file.bundled:
        tier = 2
    else:
        tier = int(file.traits.first_last != end_image)
    return tier, file.is_distilled, not file.is_for(large), not file.preferred, file.name


def _partner_rank(model: File, part: str, file: File) -> tuple:
    """The release's own before others that fit, then the graph's, then those that came with the model."""
    is_other = part == "vae" and file.traits.vae_dim in RELEASE_VAE_DIMS[1:]
    if part == "clip_vision":
        is_other = not any(text in file.name.lower() for text in CLIP_NAMES)
    return is_other, not file.preferred, file.bundled != model.bundled, file.name
