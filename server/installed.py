"""Which installed model files a job uses: those that it names, and others that belong with them."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..wan.files import INDEX_SUFFIX, SHARD_NAME
from ..wan.files.bad_file import listed
from ..wan.files.fingerprint import fingerprint
from ..wan.refusal import printable
from .graph import LOADERS
from .model_notes import FOLDERS, WANTED, Lack, lack_of, notes_on
from .model_set import File, ModelSet, Offer, choose_set
from .problems import Problem, invalid
from .traits import Traits, read_traits

if TYPE_CHECKING:
    from ..host.queue import Host

T = TypeVar("T")
Shelf = Mapping[str, Mapping[str, File]]  # what there is, by part and name
BUNDLED = Path(__file__).parents[1] / "models"
WHOLE_PIPELINES = "checkpoints"  # a second folder of models: files that hold all parts
LOOK_SECONDS = 30.0  # for the header of one file
MODELS_TOLD = 3  # of those that lack a partner


class _Look(Generic[T]):
    """One look at a file, in a thread of its own, so that a disk that does not answer stops no other job.

    Args:
        read: gives what is found.
        unread: what is given in its place where that takes longer than `LOOK_SECONDS`.
    """

    def __init__(self, path: Path, read: Callable[[], T], unread: T):
        self._path, self._ends, self._unread = path, time.monotonic() + LOOK_SECONDS, unread
        self._found: Future[T] = Future()
        job = lambda: self._found.set_result(read())  # noqa: E731
        threading.Thread(target=job, name="wan21 look", daemon=True).start()

    def found(self) -> T:
        """What the file is, as soon as it is known."""
        try:
            return self._found.result(max(0, self._ends - time.monotonic()))
        except TimeoutError:
            logging.warning(
                "Wan2.1 jobs: %s was not read within %g s", printable(str(self._path)), LOOK_SECONDS
            )
            return self._unread


class Installed:
    """The host's model folders; what a file was found to be is remembered.

    Args:
        formats: quantised formats that the host's layers read; None is all.
        shelves: gives what each of other ComfyUIs has that run the jobs in the place of this; without any,
            this one's folders count.
    """

    def __init__(
        self,
        host: "Host",
        formats: Collection[str] | None = None,
        shelves: Callable[[], Sequence[Shelf]] = tuple,
    ):
        self._shelves = shelves
        self._host = host
        self._formats = formats
        self._looks: dict[tuple[Any, ...], _Look[Traits]] = {}  # see `_traits_of`
        self._prints: dict[tuple[Any, ...], _Look[str]] = {}
        self._lock = threading.Lock()

    def choose(
        self, values: Mapping[str, Any], preferred: Mapping[str, str], end_image: bool, large: bool = False
    ) -> tuple[dict[str, str], list[str]]:
        """A file for each part. Blocking: the headers of files may be read.

        Files that the client names are taken, and the rest is chosen to go with them. Of several models
        that have all their partners, whole ones come before experts, those for the images at hand before
        others, those named for many steps and the size at hand before others, then the one that the graph
        names, the user's own by name, the one that this pack brings.

        Args:
            values: name of each part in `LOADERS`, None where one is to be chosen.
            preferred: the names in the graph.
            end_image: whether a first-last-frame model is wanted.
            large: whether the video has more pixels than 832x480.

        Returns:
            (names, notes): file of each part, clip_vision only where the model reads it and a file is there;
            lines for the task's log.

        Raises:
            Problem: 422 for a name that is not installed, not of its part or would not load, and where no
                files belong together.
        """
        shelves = self._shelves()
        names, notes = self._choose(_together(shelves), values, preferred, end_image, large)
        if not shelves or any(_holds(shelf, names) for shelf in shelves):
            return names, notes
        for shelf in shelves:  # what goes best together lies on no one shelf
            with contextlib.suppress(Problem):
                return self._choose(shelf, values, preferred, end_image, large)
        raise invalid(*_apart(names, shelves))

    def _choose(
        self,
        shelf: Shelf | None,
        values: Mapping[str, Any],
        preferred: Mapping[str, str],
        end_image: bool,
        large: bool,
    ) -> tuple[dict[str, str], list[str]]:
        offers = {part: self._offer(part, values[part], preferred.get(part), shelf) for part in LOADERS}
        wrong = {part: self._wrong_name(part, values[part], offers[part]) for part in LOADERS}
        if any(wrong.values()):
            raise invalid(*((part, problem) for part, problem in wrong.items() if problem))
        chosen = choose_set(offers, end_image, large)
        if not chosen.files:
            raise invalid(*_lacks(chosen, offers, preferred))
        names = {part: file.name for part, file in chosen.files.items()}
        return names, notes_on(chosen, offers, preferred, large)

    def look(self) -> None:
        """Reads the headers of all listed files, which later calls need not. Blocking."""
        for part in LOADERS:
            self._offer(part, None, None)

    def shelf(self) -> Shelf:
        """All listed files. Blocking, as `look`."""
        return {part: {n: self._file(part, n, None) for n in self._listed(part)} for part in LOADERS}

    def prints(self) -> dict[tuple[str, str], str]:
        """What tells the listed files from others of their names, by loader and name. Blocking, as `look`.

        Files that cannot be read are left out.
        """
        found = {
            (node, name): self._print_of(path)
            for part, (node, _) in LOADERS.items()
            for name in self._listed(part)
            if (path := self._path(part, name)) is not None
        }
        return {key: told for key, told in found.items() if told}

    def traits(self, model_name: str) -> Traits:
        """What an installed diffusion model is."""
        return self._file("model", model_name, None, _together(self._shelves())).traits

    def _offer(
        self, part: str, named: str | None, preferred: str | None, shelf: Shelf | None = None
    ) -> Offer:
        names = self._listed(part) if shelf is None else shelf[part]
        if named is not None:
            return Offer([self._file(part, named, preferred, shelf)] if named in names else [], named=True)
        files = [self._file(part, name, preferred, shelf) for name in sorted(set(names))]
        return Offer(
            [file for file in files if not file.traits.refusal],
            [file for file in files if file.traits.refusal and not file.traits.foreign],
        )

    def _listed(self, part: str) -> list[str]:
        """The files that the loader of a part offers."""
        node, name = LOADERS[part]
        spec = (self._host.node_inputs(node) or {}).get(name) or {}
        return spec.get("options") or []

    def _wrong_name(self, part: str, name: str | None, offer: Offer) -> str:
        """What is wrong with the file that the client names for a part, empty if nothing is."""
        if name is None:
            return ""
        if not offer.files:
            return f"there is no {name!r} in models/{FOLDERS[part]}"
        traits = offer.files[0].traits
        if not traits.refusal or traits.unread:
            return ""
        if traits.foreign:
            return f"{name!r} is not {WANTED[part]}: {traits.refusal}"
        return f"{name!r} would not load: {traits.refusal}"

    def _file(self, part: str, name: str, preferred: str | None, shelf: Shelf | None = None) -> File:
        if shelf is not None:
            return shelf[part][name]._replace(preferred=name == preferred)
        path = self._path(part, name)
        if path is None:
            gone = Traits(refusal="it was removed since the host listed it", foreign=True)
            return File(name, gone)
        return File(name, self._traits_of(part, path), path.is_relative_to(BUNDLED), name == preferred)

    def _path(self, part: str, name: str) -> Path | None:
        for folder in (FOLDERS[part], *([WHOLE_PIPELINES] if part == "model" else [])):
            try:
                path = self._host.model_path(folder, name)
            except OSError:
                continue
            if path.is_file():
                return path
        return None

    def _traits_of(self, part: str, path: Path) -> Traits:
        try:
            stat = path.stat()
            # A shard is as good as its set, and an encoder may have its tokenizer beside it.
            with_others = part == "text_encoder" or SHARD_NAME.fullmatch(path.name)
            with_others = with_others or path.name.endswith(INDEX_SUFFIX)
            beside = path.parent.stat().st_mtime_ns if with_others else 0
        except OSError:
            return Traits(refusal="it was removed since the host listed it", foreign=True)
        key = (part, path, stat.st_size, stat.st_mtime_ns, beside)
        with self._lock:
            if key not in self._looks:
                unread = Traits(refusal=f"not read within {LOOK_SECONDS:g} s: its disk is slow or gone")
                self._looks[key] = _Look(path, lambda: read_traits(part, path, self._formats), unread)
        return self._looks[key].found()

    def _print_of(self, path: Path) -> str:
        try:
            stat = path.stat()
        except OSError:
            return ""
        key = (path, stat.st_size, stat.st_mtime_ns)
        with self._lock:
            if key not in self._prints:
                self._prints[key] = _Look(path, lambda: _print(path), "")
        return self._prints[key].found()


def _print(path: Path) -> str:
    try:
        return fingerprint(path)
    except OSError:
        return ""


def _together(shelves: Sequence[Shelf]) -> Shelf | None:
    """What is on any shelf; None without one."""
    if not shelves:
        return None
    return {part: {n: file for shelf in shelves for n, file in shelf[part].items()} for part in LOADERS}


def _holds(shelf: Shelf, names: Mapping[str, str]) -> bool:
    return all(name in shelf[part] for part, name in names.items())


def _apart(names: Mapping[str, str], shelves: Sequence[Shelf]) -> Iterable[tuple[str, str]]:
    """(part, sentence) pairs: what the shelf with the most of the files lacks."""
    lacking = [[part for part, name in names.items() if name not in shelf[part]] for shelf in shelves]
    for part in min(lacking, key=len):
        others = listed([name for other, name in names.items() if other != part], len(names))
        yield part, f"no station has {names[part]!r} together with {others}; put them on one machine"


def _lacks(
    chosen: ModelSet, offers: Mapping[str, Offer], preferred: Mapping[str, str]
) -> Iterable[tuple[str, str]]:
    """(part, sentence) pairs: what is missing where no set is complete."""
    models = sorted(chosen.lacking, key=lambda model: len(chosen.lacking[model]))[:MODELS_TOLD]
    lacks: dict[str, list[Lack]] = {}
    for model in models:
        for part in chosen.lacking[model]:
            lack = lack_of(part, model, offers[part], preferred.get(part))
            lacks.setdefault(part, []).append(lack)
    if not models:
        lacks["model"] = [lack_of("model", None, offers["model"], preferred.get("model"))]
    for part, told in lacks.items():
        problems, fixes = (dict.fromkeys(texts) for texts in zip(*told))
        yield part, "; ".join([*problems, *fixes])
