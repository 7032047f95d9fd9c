"""The page in Markdown."""

import hashlib
import re
import subprocess
from collections import Counter

from ..markdown import table
from .rows import FINDINGS

HEAD = """# Compatibility

Written by `scripts/compatibility.py`, which runs every line on a real host; nothing in the tables is \
written by hand. Run it again on another release of the host.

{versions}

The models are small, random and in float32 on the CPU, under the key names of published files: what is \
compared is arithmetic and behaviour, not pictures.

- **equal**: ours gives what the native one gives. The figure is the norm of the difference over the norm of \
the native result, or levels of 255 for frames.
- **refused by name**: a sentence says what is wrong and what to use instead, before any heavy work.
- **said**: it differs or is left out, and the sentence in quotes says so on the node, in the log and in the \
report.
- **as native**: natively it fails too.
- **not tried**: the reason stands beside it.
- **DIFFERS IN SILENCE**, **FAILS**: findings. There {count}.

{summary}
"""


def text(versions, sections, results, before=""):
    """The whole page.

    Args:
        versions: of what was run, by name.
        sections: all, by short name, in order.
        results: rows or a reason, by the same names.
        before: a page whose other sections are kept as they are.
    """
    found = {part.partition("\n")[0]: part for part in f"\n{before}".split("\n## ")[1:]}
    for key, rows in results.items():
        section = sections[key]
        body = rows if isinstance(rows, str) else table(section.headings, (row.cells() for row in rows))
        found[section.title] = f"{section.title}\n\n{section.about}\n\n{body}\n"
    parts = [
        f"## {found[title]}" for title in dict.fromkeys(s.title for s in sections.values()) if title in found
    ]
    told = words("\n".join(parts))
    every = [word for rows in told.values() for verdicts in rows.values() for word in verdicts]
    head = HEAD.format(
        versions=table(("what", "version"), versions.items()),
        count=_counted(sum(word in FINDINGS for word in every)),
        summary=table(("section", "results"), ((title, _summary(rows)) for title, rows in told.items())),
    )
    return "\n".join([head, *parts])


def findings(results):
    """A line for each verdict that nobody is told of."""
    return [
        f"{key}: {row.name}: {verdict}"
        for key, rows in results.items()
        if not isinstance(rows, str)
        for row in rows
        for verdict in row.findings
    ]


def _counted(number):
    return {0: "are none", 1: "is one"}.get(number, f"are {number}")


def _summary(rows):
    counted = Counter(word for verdicts in rows.values() for word in verdicts if word != "-")
    return ", ".join(f"{count} {word}" for word, count in counted.most_common()) or "none: see there"


def words(page_text):
    """What a page says: section title -> row's name -> the words of its verdicts."""
    found = {}
    for line in page_text.splitlines():
        if line.startswith("## "):
            rows = found[line.removeprefix("## ")] = {}
        elif line.startswith("| `"):
            name, _, *verdicts = re.split(r"(?<!\\\\) \| ", line[2:-2])
            rows[name.strip("`")] = [verdict.partition(":")[0] for verdict in verdicts]
    return found


def commit_of(folder):
    """The commit of a pack's folder; without git, a short hash of its Python files."""
    git = subprocess.run(
        ["git", "-C", str(folder), "log", "-1", "--format=%h"], capture_output=True, text=True
    )
    if git.returncode == 0 and (folder / ".git").exists():
        return git.stdout.strip()
    whole = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py"))))
    return f"Python files with sha256 {whole.hexdigest()[:12]}"
