"""Which installed model files a job uses when it names none."""

from dataclasses import dataclass
from pathlib import Path

from ..wan.files import read_checkpoint
from ..wan.files.gguf import read_gguf
from ..wan.files.kinds import UMT5, WAN21_DIT, WAN21_VAE, detect_kind
from .graph import LOADERS
from .problems import invalid

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
    """What a file is: kind of checkpoint, input channels, whether it reads CLIP features, of two images."""

    kind: str | None = None
    channels: int | None = None
    reads_clip: bool = False
    first_last: bool = False


class Installed:
    """The host's model folders, with a memory of what each file was found to be."""

    def __init__(self, host):
        self._host = host
        self._traits = {}  # (path, size, time) -> Traits

    def choose(self, values, preferred, end_image):
        """Choose a file for each part. Blocking: it may read the headers of files.

        The rule: of the files that fit, the one that the graph names; else the first by name of the
        user's own; else the one this pack brings.

        Args:
            values: {"model": name or None, ...} for each of `LOADERS`.
            preferred: the same with the names in the graph.
            end_image: whether a first-last-frame model is wanted.

        Returns:
            (names, notes): notes are sentences about choices among several. clip_vision may be None.

        Raises:
            Problem: 422 for a name that is not installed or not of its part, or a part without any file.
        """
        names, notes, errors = {}, [], []
        for part, loader in LOADERS.items():
            name, listed = values[part], self._listed(*loader)
            if name is None:
                fitting = self._fitting(part, listed)
                if part == "model":
                    fitting = self._suited(fitting, end_image)
                if not fitting and part != "clip_vision":
                    errors.append((part, f"no file in models/{FOLDERS[part]} is {WANTED[part]}"))
                name = self._first(part, fitting, preferred.get(part))
                if len(fitting) > 1:
                    notes.append(f"{part}: {name} was chosen of {', '.join(fitting)}; name one to be sure")
            elif name not in listed:
                errors.append((part, f"there is no {name!r} in models/{FOLDERS[part]}"))
            elif part in KINDS and not self._fitting(part, [name]):
                errors.append((part, f"{name!r} is not {WANTED[part]}"))
            names[part] = name
            if part == "model" and name and values[part] is None and self._is_bundled(part, name):
                notes.append(
                    f"model: {name} is the small one that comes with Wan21, made for 64 to 128 pixels a side "
                    "and 5 to 33 frames"
                )
        if errors:
            raise invalid(*errors)
        if values["clip_vision"] is None and not self.traits(names["model"]).reads_clip:
            names["clip_vision"] = None
            notes = [note for note in notes if not note.startswith("clip_vision")]
        elif names["clip_vision"] is None:
            notes.append("clip_vision: no ViT-H file is installed, so the model runs without image features")
        return names, notes

    def traits(self, model_name):
        """Return what an installed diffusion model is."""
        return self._traits_of(FOLDERS["model"], model_name)

    def _listed(self, node, name):
        """The files that a loader of the graph offers."""
        return (self._host.node_inputs(node) or {}).get(name, {}).get("options") or []

    def _fitting(self, part, listed):
        if part == "clip_vision":
            return sorted(name for name in listed if "vision_h" in name.lower() or "vit-h" in name.lower())
        found = {name: self._traits_of(FOLDERS[part], name) for name in sorted(listed)}
        return [
            name
            for name, traits in found.items()
            if traits.kind == KINDS[part].name and (part != "model" or traits.channels == I2V_CHANNELS)
        ]

    def _suited(self, models, end_image):
        """Of the models those for one image or for two, or all of them when there are none."""
        return [name for name in models if self.traits(name).first_last == end_image] or models

    def _first(self, part, names, preferred):
        if preferred in names:
            return preferred
        own = [name for name in names if not self._is_bundled(part, name)]
        return next(iter(own or names), None)

    def _is_bundled(self, part, name):
        return self._host.model_path(FOLDERS[part], name).is_relative_to(BUNDLED)

    def _traits_of(self, folder, name):
        try:
            path = self._host.model_path(folder, name)
            stat = path.stat()
        except OSError:
            return Traits()  # removed since the host listed it
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._traits:
            self._traits[key] = _read_traits(path)
        return self._traits[key]


def _read_traits(path):
    try:
        gguf = path.suffix.lower() == ".gguf"
        tensors = read_gguf(path) if gguf else read_checkpoint(path).state_dict
    except (OSError, ValueError):
        return Traits()
    kind = detect_kind(tensors)
    patch = next((t for key, t in tensors.items() if key.endswith("patch_embedding.weight")), None)
    first_last = any(key.endswith(("img_emb.emb_pos", "image_embedder.pos_embed")) for key in tensors)
    reads_clip = any("img_emb." in key or "image_embedder." in key for key in tensors)
    return Traits(kind and kind.name, None if patch is None else patch.shape[1], reads_clip, first_last)
