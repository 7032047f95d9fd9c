"""The set of model files of a job, in sentences: what was chosen and left aside, or what is missing."""

from collections.abc import Iterator, Mapping, Sequence

from ..wan.files.bad_file import listed
from ..wan.files.kinds import CLIP_VISION, UMT5, WAN21_VAE
from .model_set import PARTNERS, File, ModelSet, Offer, fitting, mismatch
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
_SMALL = "the small one that comes with Wan21, made for 64 to 128 pixels a side and 5 to 33 frames"
_EXPERT = (
    "it has no image branch, as one expert of Wan2.2, which is made for a part of the steps only; a whole "
    "Wan2.1 image-to-video model does better"
)


def notes_on(chosen: ModelSet, offers: Mapping[str, Offer], preferred: Mapping[str, str]) -> list[str]:
    """Lines for the task's log on a complete set.

    Args:
        preferred: the names in the graph, by part: the release's files.
    """
    files, model = chosen.files, chosen.files["model"]
    parts = [f"{WORDS[part]} {file.name}" for part, file in files.items()]
    lines = [f"the job runs with {', '.join(parts[:-1])} and {parts[-1]}"]
    candidates = {"model": offers["model"].files} | {p: fitting(model, p, offers[p]) for p in PARTNERS}
    for part, several in candidates.items():
        if len(several) > 1:
            names = listed([file.name for file in several], NAMES_TOLD)
            lines.append(f"{part}: {files[part].name} was chosen of {names}; name one to be sure")
    if model.bundled and not offers["model"].named:
        lines.append(f"model: {model.name} is {_SMALL}")
    if model.is_expert:
        lines.append(f"model: {model.name} was taken though {_EXPERT}")
    lines += _left_aside(chosen, offers, preferred)
    if "clip_vision" not in files and model.traits.image_width is not None:
        lines.append("clip_vision: no ViT-H file is installed, so the model runs without image features")
    if "clip_vision" in files and model.traits.image_width is None:
        lines.append(f"clip_vision: {model.name} has no image branch and does not read it")
    return lines


def _left_aside(chosen: ModelSet, offers: Mapping[str, Offer], preferred: Mapping[str, str]) -> Iterator[str]:
    """Lines on the user's files that one might have expected to be used."""
    passed = [model for model in chosen.lacking if not model.bundled]
    for model in passed[:FILES_EXPLAINED]:
        lacks = [lack_of(part, model, offers[part], preferred.get(part)) for part in chosen.lacking[model]]
        yield f"model: {model.name} was passed over: {'; '.join(lacks)}"
    if passed[FILES_EXPLAINED:]:
        yield f"model: {len(passed) - FILES_EXPLAINED} more models were passed over"
    experts = [file.name for file in offers["model"].files if file.is_expert and file not in chosen.lacking]
    if experts and chosen.files["model"].bundled:
        yield f"model: {listed(experts, NAMES_TOLD)} would be taken only if named: {_EXPERT}"
    for part, offer in offers.items():
        if offer.refused:
            yield f"{part}: left aside, since they would not load: {_explained(offer.refused)}"


def lack_of(part: str, model: File | None, offer: Offer, release_file: str | None) -> str:
    """A sentence on why there is no file for a part, and what to do; without its full stop.

    Args:
        model: whose partner it is to be; None for the model itself.
        release_file: name of the release's file for the part.
    """
    fix = f"install {release_file}" if release_file else f"install {WANTED[part]}"
    if model is not None and not model.is_release:
        fix = f"use the {WORDS[part]} that {model.name} was made with"
    if model is not None and offer.named:
        return f"{mismatch(model, part, offer.files[0])}; name files that belong together, or leave one out"
    if model is None or not offer.files:
        problem = f"no file in models/{FOLDERS[part]} is {WANTED[part]}"
        if offer.refused:
            problem += f" that would load, {_explained(offer.refused)}"
        return f"{problem}; {fix}"
    reasons = [mismatch(model, part, file) for file in offer.files[:FILES_EXPLAINED]]
    return f"no file in models/{FOLDERS[part]} goes with {model.name} ({'; '.join(reasons)}); {fix}"


def _explained(files: Sequence[File]) -> str:
    """Files with the reasons why they would not load."""
    return listed([f"{file.name} ({as_part(file.traits.refusal)})" for file in files], FILES_EXPLAINED)
