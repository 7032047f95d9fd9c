"""ComfyUI's main.py with the pretended GPU: `python serve.py path/to/main.py [its arguments]`."""

import runpy
import sys
from pathlib import Path

import pretended_aimdo
import pretended_cuda  # noqa: F401  # main.py's own thread needs no tensors

pretended_aimdo.install()
sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
