"""Which installed model files a job uses when it names none."""

from dataclasses import dataclass
from pathlib import Path

from ..wan import checkpoint
from ..wan.checkpoint_kind import UMT5, WAN21_DIT, WAN21_VAE, detect_kind
from .problems import invalid

BUNDLED = Path(__file__).parents[1] / "models"
FOLDERS = {
    "model": "diffusion_models",
    "text_encoder": "text_encoders",
    "vae": "vae",
    "clip_vision": "clip_vision",
}
_KINDS = {"model": WAN21_DIT, "text_encoder": UMT5, "vae": WAN21_VAE}


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
            values: {"model": name or None, ...} for each of `FOLDERS`.
            preferred: the same with the names in the graph.
            end_image: whether a first-last-frame model is wanted.

        Returns:
            (names, notes): notes are sentences about choices among several.

        Raises:
            Problem: 422 for a name that is not installed, or a part without any file that fits.
        """
        names, notes, errors = {}, [], []
        for part, folder in FOLDERS.items():
            listed = self._host.model_names(folder)
            if values[part] is not None:
                names[part] = values[part]
                if values[part] not in listed:
                    errors.append((part, f"there is no {values[part]!r} in models/{folder}"))
                continue
            fitting = self._fitting(part, folder, listed, end_image)
            if not fitting and part != "clip_vision":
                errors.append((part, f"no file in models/{folder} fits; install one"))
                continue
            names[part] = self._first(folder, fitting, preferred.get(part))
            if len(fitting) > 1:
                notes.append(f"{part}: {names[part]} was chosen of {', '.join(fitting)}; name one to be sure")
        if errors:
            raise invalid(*errors)
        if values["clip_vision"] is None and not self.traits(names["model"]).reads_clip:
            names["clip_vision"] = None
            notes = [note for note in notes if not note.startswith("clip_vision")]
        return names, notes

    def traits(self, model_name):
        """Return what an installed diffusion model is."""
        return self._traits_of(FOLDERS["model"], model_name)

    def _fitting(self, part, folder, listed, end_image):
        if part == "clip_vision":
            return sorted(name for name in listed if "vision_h" in name.lower() or "vit-h" in name.lower())
        found = {name: self._traits_of(folder, name) for name in sorted(listed)}
        fitting = [name for name, traits in found.items() if traits.kind == _KINDS[part].name]
        if part != "model":
            return fitting
        models = [name for name in fitting if found[name].channels == 36]
        pairs = [name for name in models if found[name].first_last]
        return (pairs if end_image else [name for name in models if name not in pairs]) or models

    def _first(self, folder, names, preferred):
        if preferred in names:
            return preferred
        own = [name for name in names if not self._host.model_path(folder, name).is_relative_to(BUNDLED)]
        return next(iter(own or names), None)

    def _traits_of(self, folder, name):
        path = self._host.model_path(folder, name)
        try:
            stat = path.stat()
        except OSError:
            return Traits()  # removed since the host listed it
        key = (path, stat.st_size, stat.st_mtime_ns)
        if key not in self._traits:
            self._traits[key] = _read_traits(path)
        return self._traits[key]


def _read_traits(path):
    try:
        tensors = checkpoint.read_checkpoint(path).state_dict
    except ValueError:
        return Traits()
    kind = detect_kind(tensors)
    patch = next((t for key, t in tensors.items() if key.endswith("patch_embedding.weight")), None)
    first_last = any(key.endswith(("img_emb.emb_pos", "image_embedder.pos_embed")) for key in tensors)
    reads_clip = any("img_emb." in key or "image_embedder." in key for key in tensors)
    return Traits(kind and kind.name, None if patch is None else patch.shape[1], reads_clip, first_last)
