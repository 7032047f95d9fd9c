"""Nodes run in inference mode on the host."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for helpers_nodes


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
