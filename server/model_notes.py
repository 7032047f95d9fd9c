"""The set of model files of a job, in sentences: what was chosen and left aside, or what is missing."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from ..wan.files.bad_file import listed
from ..wan.files.kinds import CLIP_VISION, UMT5, WAN21_VAE
from .model_set import PARTNERS, RELEASE_VAE_DIMS, File, ModelSet, Offer, fitting
from .problems import as_part

FOLDERS = {
    "model": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "clip_vision": "clip_vision",
}
WANTED = {
    "model": "a Wan2.1 image-to-video model",
    "text_encoder": UMT5.what,
    "vae": WAN21_VAE.what,
    "clip_vision": CLIP_VISION.what,
}
WORDS = {"model": "model", "text_encoder": "text encoder", "vae": "VAE", "clip_vision": "CLIP vision"}
NAMES_TOLD = 5
FILES_EXPLAINED = 3
_SMALL = "the small one that comes with Wan21, made for 64 to 192 pixels a side and 5 to 33 frames"
_EXPERT = (
    "it has no image branch, as one expert of Wan2.2, which is made for a part of the steps only; a whole "
    "Wan2.1 image-to-video model does better"
)


class Lack(NamedTuple):
    """Why there is no file for a part, and what to do; both without a full stop."""

    problem: str
    fix: str


def notes_on(
    chosen: ModelSet, offers: Mapping[str, Offer], preferred: Mapping[str, str], large: bool
) -> list[str]:
    """Lines for the task's log on a complete set.

    Args:
        preferred: the names in the graph, by part: the release's files.
        large: whether the video has more pixels than 832x480.
    """
    files, model = chosen.files, chosen.files["model"]
    parts = [f"{WORDS[part]} {file.name}" for part, file in files.items()]
    lines = [f"the job runs with {', '.join(parts[:-1])} and {parts[-1]}"]
    models = [file for file in offers["model"].files if file not in chosen.lacking]
    models = [file for file in models if model.is_expert or not file.is_expert]
    candidates = {"model": models} | {part: fitting(model, part, offers[part]) for part in PARTNERS}
    for part, several in candidates.items():
        if len(several) > 1:
            names = listed([file.name for file in several], NAMES_TOLD)
            lines.append(f"{part}: {files[part].name} was chosen of {names}; name one to be sure")
    if model.bundled and not offers["model"].named:
        lines.append(f"model: {model.name} is {_SMALL}")
    if not offers["model"].named:
        lines += _named_otherwise(model, large)
    if model.is_expert:
        lines.append(f"model: {model.name} was taken though {_EXPERT}")
    lines += _left_aside(chosen, offers, preferred)
    if "clip_vision" not in files and model.traits.image_width is not None:
        lines.append("clip_vision: no ViT-H file is installed, so the model runs without image features")
    if "clip_vision" in files and model.traits.image_width is None:
        lines.append(f"clip_vision: {model.name} has no image branch and does not read it")
    return lines


def _named_otherwise(model: File, large: bool) -> Iterator[str]:
    """Lines on a chosen model whose name says that it is made for another job."""
    if model.is_distilled:
        yield (
            f"model: {model.name} is named as one of few steps: such models take num_inference_steps 4 to 8 "
            "and guidance_scale 1, which the job does not set by itself"
        )
    if not model.is_for(large):
        yield f"model: by its name {model.name} is made for videos of {'480p' if large else '720p'}"


def _left_aside(chosen: ModelSet, offers: Mapping[str, Offer], preferred: Mapping[str, str]) -> Iterator[str]:
    """Lines on the user's files that one might have expected to be used."""
    passed = [model for model in chosen.lacking if not model.bundled]
    for model in passed[:FILES_EXPLAINED]:
        lacks = [lack_of(part, model, offers[part], preferred.get(part)) for part in chosen.lacking[model]]
        yield f"model: passed over, since {'; '.join(f'{problem}; {fix}' for problem, fix in lacks)}"
    if passed[FILES_EXPLAINED:]:
        yield f"model: {len(passed) - FILES_EXPLAINED} more models were passed over"
    experts = [file.name for file in offers["model"].files if file.is_expert and file not in chosen.lacking]
    if experts and chosen.files["model"].bundled:
        yield f"model: {listed(experts, NAMES_TOLD)} would be taken only if named: {_EXPERT}"
    for part, offer in offers.items():
        if offer.refused:
            yield f"{part}: left aside, since they would not load: {_explained(offer.refused)}"


def lack_of(part: str, model: File | None, offer: Offer, release_file: str | None) -> Lack:
    """Why there is no file for a part.

    Args:
        model: whose partner it is to be; None for the model itself.
        release_file: name of the release's file for the part.
    """
    folder = f"models/{FOLDERS[part]}"
    fix = f"install {release_file or WANTED[part]}"
    if model is not None and not model.is_release:
        fix = f"use the {WORDS[part]} that {model.name} was made with"
    if model is None or not offer.files:
        problem = f"no file in {folder} is {WANTED[part]}"
        return Lack(
            f"{problem} that would load, {_explained(offer.refused)}" if offer.refused else problem, fix
        )
    needs = f"{model.name} needs {_needed(model, part)}"
    if offer.named:
        there = f"{offer.files[0].name} has {_size(part, offer.files[0])}"
        return Lack(f"{needs}, and {there}", "name files that belong together, or leave one out")
    there = listed([f"{file.name} ({_size(part, file)})" for file in offer.files], NAMES_TOLD)
    return Lack(f"{needs}, and {folder} has {there}", fix)


def _needed(model: File, part: str) -> str:
    """What a model takes for a partner."""
    if part == "vae":
        if not model.is_release:
            return "a small VAE of its own"
        return f"the VAE of the release, of {RELEASE_VAE_DIMS[0]} channels at its first level"
    width = model.traits.text_width if part == "text_encoder" else model.traits.image_width
    return f"a {WORDS[part]} of width {width}"


def _size(part: str, file: File) -> str:
    """The size of a file by which it belongs to a model or not."""
    traits = file.traits
    if part == "vae":
        return f"{traits.vae_dim} channels at its first level"
    return f"width {traits.text_width if part == 'text_encoder' else traits.image_width}"


def _explained(files: Sequence[File]) -> str:
    """Files with the reasons why they would not load."""
    return listed([f"{file.name} ({as_part(file.traits.refusal)})" for file in files], FILES_EXPLAINED)
