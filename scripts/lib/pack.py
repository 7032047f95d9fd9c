"""Import this pack the way ComfyUI does: as one package, whatever its folder is called.

The folder holds a `nodes/` package, and the host has a `nodes.py`; with the folder itself on
`sys.path` one would hide the other. So the pack is loaded by file under the name `wan21`, and
scripts and tests write `from wan21.wan.dit import WanModel`.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINK_NAME = "wan21-i2v"  # of the pack among the custom nodes


def load_pack(name="wan21"):
    """Import the pack under `name` and take its folder off `sys.path`. Returns the package."""
    sys.path[:] = [p for p in sys.path if Path(p or os.getcwd()).resolve() != ROOT]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


def comfyui_path():
    """Folder of the ComfyUI to use: `COMFYUI_PATH`, or the one `scripts/setup_host.py` brings in."""
    return Path(os.environ.get("COMFYUI_PATH") or ROOT / ".host" / "ComfyUI").resolve()


def load_host():
    """Make `comfy` importable in this process, on the CPU when there is no CUDA device."""
    path = comfyui_path()
    if not (path / "comfy").is_dir():
        raise SystemExit(f"No ComfyUI at {path}: run `make setup`, or set COMFYUI_PATH.")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    args.use_pytorch_cross_attention = True
    return path


def link_pack(custom_nodes):
    """Make the pack appear in the folder `custom_nodes` and return its path there.

    A pack that already lies or is linked there, under whatever name, is left as it is.
    """
    custom_nodes = Path(custom_nodes)
    for entry in custom_nodes.iterdir():
        if entry.resolve() == ROOT:
            return entry
    link = custom_nodes / LINK_NAME
    if link.is_symlink() and not link.exists():
        link.unlink()  # it points to a folder that is gone
    if link.exists():
        raise SystemExit(f"{link} is another copy of this pack. Remove or rename it, then run again.")
    link.symlink_to(ROOT, target_is_directory=True)
    return link
