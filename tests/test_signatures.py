"""Every public signature of the pack is annotated: arguments and result. `make lint` checks that they fit."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("wan", "host", "net", "frames", "nodes", "server", "workers")
FILES = sorted([ROOT / "extension.py", *(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))])


def public_functions(tree, owner=""):
    """(name, function) of the functions of a module and the methods of its public classes."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node, f"{node.name}.")
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_function and (not node.name.startswith("_") or node.name in ("__init__", "__call__")):
            yield owner + node.name, node


def bare(source):
    """What is not annotated in a source: "line name: arguments"."""
    for name, function in public_functions(ast.parse(source)):
        given = function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        if "." in name and not any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list):
            arguments = arguments[1:]  # self, cls
        missing = [a.arg for a in arguments if a.annotation is None]
        more = [a for a in (given.vararg, given.kwarg) if a is not None]
        missing += [f"*{a.arg}" for a in more if a.annotation is None]
        if function.returns is None and function.name != "__init__":
            missing.append("result")
        if missing:
            yield f"line {function.lineno}, {name}: {', '.join(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_is_annotated(path):
    assert list(bare(path.read_text(encoding="utf-8"))) == []


def test_what_is_bare_is_found():
    source = "def f(a: int, b, *c) -> int: ...\nclass A:\n    def g(self, x): ...\n    def _h(self, x): ...\n"
    assert list(bare(source)) == ["line 1, f: b, *c", "line 3, A.g: x, result"]
