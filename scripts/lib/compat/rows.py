"""Rows of the page, and what the outcomes of two runs say about each other."""

from dataclasses import dataclass

import torch

ONE_LEVEL = 1 / 255
LONGEST = 360  # characters of a cell
SAME = 1e-3  # of the norm: float32 sums in another order, carried through a few steps
ACTS = 1e-5  # of the norm: what a patch changes at the least
EQUAL, REFUSED, SAID, AS_NATIVE, SILENT, FAILS, NOT_TRIED = (
    "equal", "refused by name", "said", "as native", "DIFFERS IN SILENCE", "FAILS", "not tried",
)  # fmt: skip
FINDINGS = (SILENT, FAILS)


@dataclass
class Verdict:
    """What came of one trial.

    Attributes:
        word: one of the words above.
        detail: figures, the sentence of a refusal, the reason.
    """

    word: str
    detail: str = ""

    def __str__(self):
        return f"{self.word}: {_cell(self.detail)}" if self.detail else self.word


@dataclass
class Row:
    """One line of a table.

    Attributes:
        name: of the node, the template, the file.
        about: what was done, or what natively comes of it.
        verdicts: one for each further column.
    """

    name: str
    about: str
    verdicts: list[Verdict]

    @property
    def findings(self):
        """Verdicts that nobody was told of."""
        return [verdict for verdict in self.verdicts if verdict.word in FINDINGS]

    def cells(self):
        return [f"`{self.name}`", _cell(self.about), *map(str, self.verdicts)]


def _cell(text):
    short = text if len(text) <= LONGEST else f"{text[:LONGEST]} …"
    return " ".join(short.split()).replace("|", "\\|").replace("<", "&lt;")


def distance(a, b):
    """(largest difference, norm of the difference over the norm of b), the worst tensor; None: other shapes.

    Args:
        a, b: tensors by name.
    """
    if a.keys() != b.keys() or any(a[k].shape != b[k].shape for k in a):
        return None
    most, worst = 0.0, 0.0
    for key in a:
        x, y = a[key].double(), b[key].double()
        if not torch.equal(x.isfinite(), y.isfinite()):
            return None
        x, y = x.nan_to_num(), y.nan_to_num()
        most = max(most, (x - y).abs().max().item() if x.numel() else 0.0)
        worst = max(worst, ((x - y).norm() / y.norm().clamp_min(1e-9)).item())
    return most, worst


def compare(native, ours, pictures=False, said=(), allowed=SAME):
    """The `Verdict` on ours beside native.

    Args:
        native, ours: Outcomes.
        pictures: whether they hold frames in [0, 1], which are equal to 1/255.
        said: sentences of ours that speak of a difference.
        allowed: share of the norm, of what is not pictures.
    """
    if ours.refused:
        return Verdict(REFUSED, ours.error)
    if ours.error:
        return Verdict(AS_NATIVE, "it fails natively too") if native.error else Verdict(FAILS, ours.error)
    if native.error:
        return Verdict(EQUAL, "works here; natively it fails")
    apart = distance(ours.tensors, native.tensors)
    told = f"“{' / '.join(said)}”" if said else ""
    if apart is None:
        figure = f"{_shapes(ours)} for {_shapes(native)}"
        return Verdict(SAID, f"{figure}; {told}") if said else Verdict(SILENT, figure)
    most, share = apart
    figure = f"{255 * most:.2f}/255" if pictures else f"{share:.0e}"
    if said:
        return Verdict(SAID, f"{figure}; {told}")
    near = most <= ONE_LEVEL if pictures else share <= allowed
    return Verdict(EQUAL if near else SILENT, figure)


def _shapes(outcome):
    def of(tensor):
        return f"{list(tensor.shape)}{'' if tensor.isfinite().all() else ' with NaN'}"

    return ", ".join(map(of, outcome.tensors.values())) or "nothing"
