"""The job API's modules stand on their own: ComfyUI and our nodes come in through `host.queue` alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    f"wan21.{folder}.{path.stem}"
    for folder in ("server", "net")
    for path in (ROOT / folder).glob("*.py")
    if path.stem != "__init__"
)
PROGRAM = """
import importlib, sys

sys.path.insert(0, sys.argv[1])
from lib import pack

pack.load_pack()
blocked = ("comfy", "comfy_api", "execution", "folder_paths", "nodes", "server")
sys.modules.update(dict.fromkeys(blocked))  # None: importing them raises
for name in sys.argv[2:]:
    importlib.import_module(name)
ours = [name for name in sys.modules if name.startswith(("wan21.nodes", "wan21.host"))]
assert not ours, ours
"""


def test_no_module_imports_the_host_or_the_nodes():
    assert {"wan21.server.webhooks", "wan21.server.store", "wan21.server.fields"} <= set(MODULES)
    command = [sys.executable, "-c", PROGRAM, str(ROOT / "scripts"), *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
