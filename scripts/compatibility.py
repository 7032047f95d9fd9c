"""Try other nodes and files on a real host, natively and with ours, and write docs/compatibility.md.

    python scripts/compatibility.py --packs FOLDER      # about ten minutes on two cores
    python scripts/compatibility.py --packs FOLDER --only nodes samplers    # the other sections stay
    python scripts/compatibility.py --only nodes --names CFGNorm --page some.md

Every table is the result of the run; nothing in them is written by hand, and the nodes are those that the
running host lists. On the next release of the host, run it again and read what changed. It ends with 1 if
anything differs and nobody is told, or fails where the native one works. Packs of other people that lie in
FOLDER are tried too; the Python packages that they need must be importable (PYTHONPATH).
"""

import argparse
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from lib.compat import page
from lib.compat.bench import Bench
from lib.compat.checkpoints import make_models
from lib.compat.files import Files
from lib.compat.graphs import base, host_sampled
from lib.compat.kinds import SORTS
from lib.compat.loaders import Loaders, make_loaded
from lib.compat.models import ModelNodes
from lib.compat.rows import EQUAL, compare
from lib.compat.samplers import Samplers
from lib.compat.templates import Templates
from lib.pack import ROOT, load_host, load_pack

PAGE = ROOT / "docs" / "compatibility.md"
PACKS = ("ComfyUI-KJNodes", "ComfyUI-GGUF")  # named on the page even where they are not tried


def arguments(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--packs", type=Path, help="folder of other packs, one in each of its folders")
    parser.add_argument("--only", nargs="+", help=f"sections: {', '.join(sections())}")
    parser.add_argument("--names", nargs="+", help="rows of these sections; all by default; needs --page")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write")
    args = parser.parse_args(argv)
    if args.names and args.page == PAGE:
        parser.error("--names runs a part of a section: give --page, so that the others' rows stay")
    return args


def sections(packs=()):
    """Every section of the page by its short name, in order."""
    found = {"templates": Templates(), "nodes": ModelNodes(), "samplers": Samplers(), "loaders": Loaders()}
    found |= {sort: Files(sort) for sort in SORTS}
    return found | {name: ModelNodes(name) for name in dict.fromkeys([*PACKS, *packs])}


def run(bench, chosen, names=None, say=print):
    """Run sections on a running `Bench`.

    Args:
        chosen: sections by short name.
        names: of the rows; None for all of each section.
        say: told of every row.

    Returns:
        Rows by short name of their section; in place of those of one that cannot be run, why.
    """
    results = {}
    for key, section in chosen.items():
        if reason := section.missing(bench):
            results[key] = reason
            continue
        rows = results[key] = []
        wanted = [name for name in section.names(bench) if names is None or name in names]
        section.prepare(bench, wanted)
        for i, name in enumerate(wanted, 1):
            start = time.monotonic()
            rows.append(section.row(bench, name))
            words = ", ".join(verdict.word for verdict in rows[-1].verdicts)
            say(f"{key} {i}/{len(wanted)}: {name}: {words} ({time.monotonic() - start:.1f} s)", flush=True)
    return results


def check(bench):
    """End here if the plain graph does not run: every row would then fail natively and with ours alike."""
    kinds = ("native", "ours")
    native, ours = (bench.run(host_sampled(base(kind), ["model", 0]), ["sampled", 0]) for kind in kinds)
    verdict = compare(native, ours)
    if native.error or verdict.word != EQUAL:
        wrong = native.error or verdict
        raise SystemExit(f"The plain graph, without any other node: {wrong}. See {bench.server.log_path}.")


def versions(packs):
    """What was run, by name."""
    import torch
    from comfyui_version import __version__ as comfyui

    found = {"ComfyUI": comfyui}
    for package in ("comfyui-workflow-templates", "comfyui-frontend-package"):
        found[package] = version(package)
    return found | {pack.name: page.commit_of(pack) for pack in packs} | {"torch": torch.__version__}


def main():
    """Run what the command line asks for and write the page."""
    args = arguments()
    load_host()
    load_pack()
    packs = sorted(p for p in args.packs.iterdir() if p.is_dir()) if args.packs else []
    every = sections(pack.name for pack in packs)
    chosen = {key: every[key] for key in args.only or every}
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder) / "models")
        make_loaded(models)
        with Bench(Path(folder) / "host", models, packs) as bench:
            check(bench)
            results = run(bench, chosen, args.names)
    before = args.page.read_text(encoding="utf-8") if args.only and args.page.exists() else ""
    args.page.write_text(page.text(versions(packs), every, results, before), encoding="utf-8")
    findings = page.findings(results)
    print("\n".join([f"Written: {args.page}", *findings]))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
