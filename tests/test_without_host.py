"""`tests/wan` in a Python that has neither ComfyUI nor what only ComfyUI needs."""

import os
import subprocess
import sys

import pytest
from lib.pack import ROOT

HOST = {
    "comfy", "comfy_api", "comfy_execution", "comfy_extras", "execution", "folder_paths", "latent_preview",
    "node_helpers", "nodes", "server",
    "aiohttp", "alembic", "av", "comfy_aimdo", "comfy_kitchen", "comfyui_frontend_package", "kornia",
    "spandrel", "sqlalchemy", "torchsde",
}  # fmt: skip
PYTEST = f"""
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

@classmethod
def find_spec(cls, name, *where):
    return None if name.partition(".")[0] in {HOST!r} else find(name, *where)

PathFinder.find_spec = find_spec
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
CHOSEN = "equals_diffusers or native_keys or published_timesteps or decoder_of_a_full_umt5"


def run(tmp_path, *arguments):
    """pytest without the host, as (exit status, output)."""
    command = [sys.executable, "-c", PYTEST, "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"COMFYUI_PATH": str(tmp_path)}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_tests_of_wan_need_no_host(tmp_path):
    """All are collected, and those that load the comparison libraries run."""
    status, output = run(tmp_path, "tests/wan", "-k", CHOSEN)
    assert status == pytest.ExitCode.OK, output[-4000:]


def test_an_import_of_the_host_is_found(tmp_path):
    module = tmp_path / "test_with_host.py"
    module.write_text("import comfy.ops\n\ndef test_nothing():\n    pass\n")
    status, output = run(tmp_path, str(module))
    assert status == pytest.ExitCode.INTERRUPTED and "No module named 'comfy'" in output, output[-4000:]
