"""The pack as `wan21`, importable in every test; and how many tests run at once.

The host is not loaded here: tests of `wan/` need torch, safetensors and einops alone.
"""

import os

import hypothesis
import pytest
from lib import pack

pack.load_pack()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the servers that tests start: they share the cores

import torch  # noqa: E402

hypothesis.settings.register_profile("tests", deadline=None)  # an example may meet a busy machine
hypothesis.settings.load_profile("tests")
torch.set_num_threads(1)  # tensors are tiny here, and another worker has the other core


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """One worker for each core that this process may use; on a single core no worker at all.

    The default counts the machine's cores, hyperthreads left out, which a container may have few of.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return cores if cores > 1 else 0
