"""Loads the pack as `wan21` and puts a real ComfyUI within reach, before any test is imported."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "tests"))  # for helpers.py
sys.path.insert(0, str(Path(__file__).parent / "scripts"))

from lib import pack

pack.load_pack()
pack.load_host()

import torch  # noqa: E402

torch.set_num_threads(1)  # tensors are tiny here: two threads would mostly wait for each other
