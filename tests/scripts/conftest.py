"""As on the host: inference mode."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield
