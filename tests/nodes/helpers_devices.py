"""Several devices without a GPU: the host takes `cpu` and `cpu:0`, `cpu:1` for different ones."""

from contextlib import contextmanager

import torch
from comfy import model_management
from wan21 import host


def unmapped(path, weight_dtype="default"):
    """A MODEL whose weights lie in memory as its copies' do, not where they lie in the mapped file.

    MKL rounds by how numbers are aligned.
    """
    model = host.load_model(path, weight_dtype)
    for parameter in model.model.parameters():
        parameter.data = parameter.data.clone()
    return model


@contextmanager
def several_devices(monkeypatch, count=2):
    """Gives `split(model)`: the host's node MultiGPU CFG Split, on a host that lists so many devices."""
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    devices = [torch.device("cpu"), *(torch.device("cpu", i) for i in range(count - 1))]
    with monkeypatch.context() as patch:
        patch.setattr(model_management, "get_all_torch_devices", lambda exclude_current=False: devices)

        def split(model):
            model_management.cleanup_models_gc()  # the node fails over entries of MODELs that are gone
            model_management.cleanup_models()
            return MultiGPUCFGSplitNode.execute(model, count).result[0]

        yield split
