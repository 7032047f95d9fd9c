"""Random weights and inputs for the VAE, and what its tests measure."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def randomise(model, seed=0):
    """Weights that keep activations near 1 through all layers, every parameter different."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("weight"):
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.1 * noise + name.endswith("gamma")
    return model.eval().requires_grad_(False)


def pixels(frames, h=24, w=40, batch=1):
    return torch.rand(batch, 3, frames, h, w, generator=torch.Generator().manual_seed(frames)) * 2 - 1


def latents(frames, h=3, w=5, batch=1):
    return torch.randn(batch, 16, frames, h, w, generator=torch.Generator().manual_seed(frames))


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensor storage alive at once among those made within the context."""

    def __init__(self):
        super().__init__()
        self.live, self.foreign, self.now, self.peak = {}, set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for key, storage in storages((args, kwargs)):
            if key not in self.live and key not in self.foreign:
                self.foreign.add(key)
                weakref.finalize(storage, self.foreign.discard, key)  # its address may be taken again
        result = func(*args, **(kwargs or {}))
        for key, storage in storages(result):
            if key not in self.live and key not in self.foreign:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, key)
        self.peak = max(self.peak, self.now)
        return result

    def free(self, key):
        self.now -= self.live.pop(key, 0)


def storages(tree):
    tensors = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [(tensor.untyped_storage()._cdata, tensor.untyped_storage()) for tensor in tensors]


def peak_bytes(call, *args, **options):
    with PeakBytes() as meter:
        call(*args, **options)
    return meter.peak
