"""Rows as lines of a table, and everything as JSON."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .bench import Row

NAME_WIDTH = 50


def heading(section: str) -> str:
    """Line above the rows of a section."""
    columns = f"{'value':>10} {'unit':5} {'ratio':>6} {'rate':>16} {'error':>8} {'peak GiB':>9}"
    return f"\n{section:{NAME_WIDTH + 2}} {columns}"


def line(row: Row) -> str:
    """A row of the table. Its ratio is to the row that the note names."""
    if row.skipped:
        return f"  {row.name:{NAME_WIDTH}} not measured: {row.skipped}"
    if isinstance(row.value, str):
        return f"  {row.name:{NAME_WIDTH}} {row.value}  {row.note}".rstrip()
    value = "" if row.value is None else f"{row.value:.4g}"
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    rate = "" if row.rate is None else f"{row.rate:.4g} {row.rate_unit}"
    error = "" if row.error is None else f"{row.error:.1e}"
    peak = "" if row.peak_gib is None else f"{row.peak_gib:.2f}"
    note = "; ".join(part for part in (f"of {row.beside}" if row.beside else "", row.note) if part)
    columns = f"{value:>10} {row.unit:5} {ratio:>6} {rate:>16} {error:>8} {peak:>9}"
    return f"  {row.name:{NAME_WIDTH}} {columns}  {note}".rstrip()


def write(path: Path, facts: dict[str, Any], sections: Iterable[dict[str, Any]]) -> None:
    """Everything measured so far; a run that is cut leaves the last whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(facts | {"sections": list(sections)}, indent=1) + "\n", encoding="utf-8")
    whole.replace(path)
