"""Which folder of the pack may import which, by reading the sources: nothing imports upward or sideways."""

import ast
import re
import sys

import pytest
from lib.pack import ROOT

# Folder -> folders below it. The root's own modules are `extension`, which knows all of them.
BELOW = {
    "nodes": {"host", "workers", "net", "frames", "wan"},
    "server": {"host", "workers", "net", "frames", "wan"},
    "host": {"frames", "wan"},
    "workers": {"wan"},
    "net": {"wan"},
    "frames": {"wan"},
    "wan": set(),
}
IN_WAN = {"torch", "safetensors", "einops"}
IN_FUNCTIONS_OF_WAN = {"gguf"}  # optional
IN_KERNELS = {"triton"}  # optional too: in the modules of wan/kernels/, which are imported in a function
# ComfyUI's internals are for host/; what it offers to custom nodes, for nodes/ and extension as well.
INTERNALS = {
    "comfy", "comfy_aimdo", "comfy_execution", "comfy_extras", "comfy_kitchen", "execution",
    "latent_preview", "main", "nodes", "server",
}  # fmt: skip
OFFERED = {"comfy_api", "folder_paths", "node_helpers"}
MAY_USE_OFFERED = {"host", "nodes", ""}

SOURCES = {
    path.relative_to(ROOT).with_suffix("").parts: path.read_text(encoding="utf-8")
    for folder in (ROOT, *(ROOT / name for name in BELOW))
    for path in (folder.glob("*.py") if folder == ROOT else folder.rglob("*.py"))
    if path.name != "conftest.py"
}
# Keys that files carry, an ending of file names, and a package of kernels, which needs no host.
KEYS = re.compile(
    r"comfy_kitchen\.\w+|comfy-kitchen|comfy_quant|comfy\.gguf\.orig_shape|(?<!\w)_comfyui(?!\w)"
)
HOSTS_WORDS = re.compile(r"\w*comfy\w*|\bWan21[A-Z]\w*", re.IGNORECASE)


def imports(module, source):
    """Yields (parts of the imported name, line, whether in a function); those of the pack begin with `.`."""
    package = module[:-1]  # of `a/__init__.py` and of `a/b.py` alike

    def visit(node, in_function):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), node.lineno, in_function
        elif isinstance(node, ast.ImportFrom):
            named = node.module.split(".") if node.module else []
            base = [".", *package[: len(package) - node.level + 1], *named] if node.level else named
            for alias in node.names if base == ["."] else [None]:
                yield (base if alias is None else [*base, alias.name]), node.lineno, in_function
        in_function = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, in_function)

    return visit(ast.parse(source), False)


def problems(module, source):
    """Sentences about the imports of one module that it may not have.

    Args:
        module: parts of its name, ("wan", "vae", "layers").
        source: its text.
    """
    folder = module[0] if len(module) > 1 else ""
    for name, line, in_function in imports(module, source):
        where = f"{'/'.join(module)}.py:{line}"
        if name[0] == ".":
            if folder and name[1] != folder and name[1] not in BELOW[folder]:
                yield f"{where}: {folder} may not import {name[1]}"
            continue
        top = name[0]
        if top in INTERNALS and folder != "host":
            yield f"{where}: {top} is imported in host/ only"
        elif top in OFFERED and folder not in MAY_USE_OFFERED:
            yield f"{where}: {folder} may not import {top}"
        elif folder == "wan" and not (
            top in sys.stdlib_module_names | IN_WAN
            or (in_function and top in IN_FUNCTIONS_OF_WAN)
            or (top in IN_KERNELS and module[:2] == ("wan", "kernels") and module[2] != "__init__")
        ):
            yield f"{where}: wan may not import {top}"


def test_no_module_imports_upward_or_sideways():
    assert {("extension",), ("wan", "vae", "__init__"), ("host", "queue")} <= SOURCES.keys()
    assert [problem for module, source in SOURCES.items() for problem in problems(module, source)] == []


@pytest.mark.parametrize(
    "module, source, problem",
    [
        ("wan/vae/layers", "from ..dit import WanModel", None),
        ("wan/vae/__init__", "from ..dit import WanModel", None),
        ("wan/dit", "from ..host import model", "wan may not import host"),
        ("wan/vae/layers", "from ... import frames", "wan may not import frames"),
        ("wan/dit", "import numpy as np", "wan may not import numpy"),
        ("wan/dit", "import torch.nn.functional", None),
        ("wan/files/gguf", "def read():\n    import gguf", None),
        ("wan/files/gguf", "import gguf", "wan may not import gguf"),
        ("wan/kernels/rms_rope", "import triton.language as tl", None),
        ("wan/kernels/__init__", "import triton", "wan may not import triton"),
        ("wan/glue", "import triton", "wan may not import triton"),
        ("net/fetch", "from ..host import queue", "net may not import host"),
        ("frames/lanczos", "from .. import net, wan", "frames may not import net"),
        ("host/model", "from ..frames import lanczos", None),
        ("host/model", "from ..nodes import report", "host may not import nodes"),
        ("nodes/lora", "from ..server.app import create_app", "nodes may not import server"),
        ("server/tasks", "def run():\n    from ..nodes import sampler", "server may not import nodes"),
        ("nodes/lora", "import comfy.utils", "comfy is imported in host/ only"),
        ("server/tasks", "from server import PromptServer", "server is imported in host/ only"),
        ("server/tasks", "import folder_paths", "server may not import folder_paths"),
        ("nodes/lora", "import folder_paths", None),
        ("extension", "from . import server\nfrom .nodes.load import Wan21ModelLoader", None),
        ("extension", "import nodes", "nodes is imported in host/ only"),
    ],
)
def test_a_wrong_import_is_found(module, source, problem):
    found = [text.partition(": ")[2] for text in problems(tuple(module.split("/")), source)]
    assert found == [problem] * (problem is not None)


def hosts_words(source):
    """(line, word) of what names the host or one of our nodes."""
    for number, line in enumerate(source.splitlines(), 1):
        yield from ((number, word) for word in HOSTS_WORDS.findall(KEYS.sub("", line)))


def test_wan_names_neither_the_host_nor_a_node():
    assert [
        f"{'/'.join(module)}.py:{line}: {word}"
        for module, source in SOURCES.items()
        if module[0] == "wan"
        for line, word in hosts_words(source)
    ] == []


def test_a_word_of_the_host_is_found():
    source = "# as ComfyUI does\nKEY = 'comfy_quant'\n'see Wan21VAELoader'\nWAN21_DIT = 1"
    assert list(hosts_words(source)) == [(1, "ComfyUI"), (3, "Wan21VAELoader")]
