"""Which installed model files a job uses when it names none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..wan.files import read_checkpoint
from ..wan.files.gguf import read_gguf
from ..wan.files.kinds import UMT5, WAN21_DIT, WAN21_VAE, detect_kind
from .graph import LOADERS
from .problems import invalid

if TYPE_CHECKING:
    from ..host.queue import Host

BUNDLED = Path(__file__).parents[1] / "models"
FOLDERS = {
    "model": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "clip_vision": "clip_vision",
}
KINDS = {"model": WAN21_DIT, "text_encoder": UMT5, "vae": WAN21_VAE}
WANTED = {part: kind.what for part, kind in KINDS.items()} | {"model": "a Wan2.1 image-to-video model"}
I2V_CHANNELS = 36


@dataclass(frozen=True)
class Traits:
    """What a checkpoint is, by its tensors.

    Attributes:
        kind: name of a `Kind`; None for a file that is none or cannot be read.
        channels: input channels of a DiT.
        reads_clip: whether a DiT has a CLIP vision branch.
        first_last: whether that branch is for the images of a first-last-frame model.
    """

    kind: str | None = None
    channels: int | None = None
    reads_clip: bool = False
    first_last: bool = False


class _Choice(NamedTuple):
    """The file for one part, lines for the task's log, and what is wrong with it."""

    name: str | None = None
    notes: Sequence[str] = ()
    problem: str = ""


class Installed:
    """The host's model folders; what a file was found to be is remembered."""

    def __init__(self, host: "Host"):
        self._host = host
        self._traits: dict[tuple[Path, int, int], Traits] = {}  # by path, size and time

    def choose(
        self, values: Mapping[str, Any], preferred: Mapping[str, str], end_image: bool
    ) -> tuple[dict[str, str], list[str]]:
        """A file for each part. Blocking: the headers of files may be read.

        Of the files that fit, the one that the graph names is taken; else the first by name of the user's
        own; else the one that this pack brings.

        Args:
            values: name of each part in `LOADERS`, None where one is to be chosen.
            preferred: the names in the graph.
            end_image: whether a first-last-frame model is wanted.

        Returns:
            (names, notes): file of each part, clip_vision only where the model reads it and a file is there;
            lines for the task's log.

        Raises:
            Problem: 422 for a name that is not installed or not of its part, or a part without any file.
        """
        names: dict[str, str] = {}
        notes: list[str] = []
        errors: list[tuple[str, str]] = []
        for part in LOADERS:
            if values[part] is None:
                choice = self._chosen(part, preferred.get(part), end_image)
            else:
                choice = self._named(part, values[part])
            notes += choice.notes
            if choice.problem:
                errors.append((part, choice.problem))
            elif choice.name is not None:
                names[part] = choice.name
        if errors:
            raise invalid(*errors)
        if values["clip_vision"] is None and not self.traits(names["model"]).reads_clip:
            names.pop("clip_vision", None)
            notes = [note for note in notes if not note.startswith("clip_vision")]
        elif "clip_vision" not in names:
            notes.append("clip_vision: no ViT-H file is installed, so the model runs without image features")
        return names, notes

    def traits(self, model_name: str) -> Traits:
        """What an installed diffusion model is."""
        return self._traits_of(FOLDERS["model"], model_name)

    def _named(self, part: str, name: str) -> _Choice:
        """The file that the client names, where it is one of this part."""
        if name not in self._listed(part):
            return _Choice(problem=f"there is no {name!r} in models/{FOLDERS[part]}")
        if part in KINDS and not self._fitting(part, [name]):
            return _Choice(problem=f"{name!r} is not {WANTED[part]}")
        return _Choice(name)

    def _chosen(self, part: str, preferred: str | None, end_image: bool) -> _Choice:
        """A file for a part that the client does not name."""
        fitting = self._fitting(part, self._listed(part))
        if part == "model":
            fitting = self._suited(fitting, end_image)
        if not fitting:
            problem = f"no file in models/{FOLDERS[part]} is {WANTED[part]}" if part in WANTED else ""
            return _Choice(problem=problem)
        name, notes = self._first(part, fitting, preferred), []
        if len(fitting) > 1:
            notes.append(f"{part}: {name} was chosen of {', '.join(fitting)}; name one to be sure")
        if part == "model" and self._is_bundled(part, name):
            notes.append(
                f"model: {name} is the small one that comes with Wan21, made for 64 to 128 pixels a side "
                "and 5 to 33 frames"
            )
        return _Choice(name, notes)

    def _listed(self, part: str) -> list[str]:
        """The files that the loader of a part offers."""
        node, name = LOADERS[part]
        spec = (self._host.node_inputs(node) or {}).get(name) or {}
        return spec.get("options") or []

    def _fitting(self, part: str, listed: Sequence[str]) -> list[str]:
        if part == "clip_vision":
            return sorted(name for name in listed if "vision_h" in name.lower() or "vit-h" in name.lower())
        found = {name: self._traits_of(FOLDERS[part], name) for name in sorted(listed)}
        return [
            name
            for name, traits in found.items()
            if traits.kind == KINDS[part].name and (part != "model" or traits.channels == I2V_CHANNELS)
        ]

    def _suited(self, models: list[str], end_image: bool) -> list[str]:
        """Those models that are for one image or for two, or all of them when none is."""
        return [name for name in models if self.traits(name).first_last == end_image] or models

    def _first(self, part: str, names: list[str], preferred: str | None) -> str:
        if preferred in names:
            return preferred
        own = [name for name in names if not self._is_bundled(part, name)]
        return (own or names)[0]

    def _is_bundled(self, part: str, name: str) -> bool:
        return self._host.model_path(FOLDERS[part], name).is_relative_to(BUNDLED)

    def _traits_of(self, folder: str, name: str) -> Traits:
        try:
            path = self._host.model_path(folder, name)
            stat = path.stat()
        except OSError:
            return Traits()  # removed since the host listed it
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._traits:
            self._traits[key] = _read_traits(path)
        return self._traits[key]


def _tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint, by name."""
    return read_gguf(path) if path.suffix.lower() == ".gguf" else read_checkpoint(path).state_dict


def _read_traits(path: Path) -> Traits:
    try:
        tensors = _tensors(path)
    except (OSError, ValueError):
        return Traits()
    kind = detect_kind(tensors)
    patch = next((t for key, t in tensors.items() if key.endswith("patch_embedding.weight")), None)
    first_last = any(key.endswith(("img_emb.emb_pos", "image_embedder.pos_embed")) for key in tensors)
    reads_clip = any("img_emb." in key or "image_embedder." in key for key in tensors)
    return Traits(kind and kind.name, None if patch is None else patch.shape[1], reads_clip, first_last)
