"""Files of every kind and layout: what our loaders make of them, beside the native loaders."""

from pathlib import Path

from . import layouts as to
from .graphs import base, host_sampled
from .kinds import SORTS, Kind
from .rows import ACTS, EQUAL, SILENT, Row, Verdict, compare, distance


class Files:
    """Files of one sort: diffusion models, VAEs, text encoders or LoRAs.

    Args:
        sort: key of `SORTS`.
    """

    headings = ("file", "natively", "ours")

    def __init__(self, sort):
        self.title, self.sort = f"Files: {sort}", SORTS[sort]
        self.about, self.exact = self.sort.about, {}

    def missing(self, bench):
        return None

    def names(self, bench):
        """The kinds, in words."""
        return list(self.sort.kinds)

    def prepare(self, bench, names):
        """Write the files, and their numbers in plain form beside those that hold other numbers."""
        from safetensors.torch import load_file

        from .layouts import save

        folder = bench.models / self.sort.folder
        weights = load_file(folder / self.sort.plain)
        for name in names:
            path = bench.models / self._path(name)
            path.parent.mkdir(exist_ok=True)
            exact = self.sort.kinds[name].write(path, weights)
            self.exact[name] = self.sort.plain if exact is None else None
            if exact:
                self.exact[name] = f"plain-{path.stem}.safetensors"
                save(folder / self.exact[name], exact)

    def _path(self, name):
        kind = self.sort.kinds[name]
        stem = "".join(c if c.isalnum() else "-" for c in name)
        return Path(kind.folder or self.sort.folder) / f"compat-{stem}{kind.ending}"

    def row(self, bench, name):
        """Load one of them natively and with ours."""
        kind, file = self.sort.kinds[name], self._path(name).name
        native, ours = (bench.run(*self.sort.graph(which, file, kind)) for which in ("native", "ours"))
        natively = self._natively(bench, native)
        verdict = compare(native, ours, self.sort.pictures)
        if verdict.word == SILENT and ours.notes:
            verdict = compare(native, ours, self.sort.pictures, said=ours.notes)
        if (natively == "loads" and verdict.word != SILENT) or ours.error or self.exact[name] is None:
            return Row(name, natively, [verdict])
        exact = bench.run(*self.sort.graph("native", self.exact[name], Kind(to.plain)))
        if natively == "loads":
            return Row(name, natively, [_nearer(verdict, exact, native, ours)])
        verdict = compare(exact, ours, self.sort.pictures)
        beside = f"{verdict.detail}, beside the same numbers in plain form"
        return Row(name, natively, [Verdict(verdict.word, beside)])

    def _natively(self, bench, native):
        if native.error:
            return f"not read: {native.error.splitlines()[0][:160]}"
        if self.sort.is_patch:
            graph = host_sampled(base("native"), ["model", 0])
            plain = bench.once("native, no LoRA", lambda: bench.run(graph, ["sampled", 0]))
            apart = distance(native.tensors, plain.tensors)
            if apart and apart[1] < ACTS:
                return "no key of it acts"
        return "loads"


def _nearer(verdict, exact, native, ours):
    """Of a format that rounds its inputs too, where a last bit decides: is ours as near the exact numbers?"""
    apart = [distance(outcome.tensors, exact.tensors) for outcome in (ours, native)]
    if None in apart or apart[0][1] > 1.05 * apart[1][1] or apart[0][1] < ACTS:
        return verdict
    return Verdict(EQUAL, "{:.1e} from the exact numbers, natively {:.1e}".format(*(x[1] for x in apart)))
