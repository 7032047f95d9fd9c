"""How many bytes of tensors are alive."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensor storage alive at once among those made within the context.

    Args:
        device: counts the tensors of this device only; None counts all.
    """

    def __init__(self, device=None):
        super().__init__()
        self.device = device
        self.live, self.foreign, self.now, self.peak = {}, set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for key, storage in self._storages((args, kwargs)):
            if key not in self.live and key not in self.foreign:
                self.foreign.add(key)
                weakref.finalize(storage, self.foreign.discard, key)  # its address may be taken again
        result = func(*args, **(kwargs or {}))
        for key, storage in self._storages(result):
            if key not in self.live and key not in self.foreign:
                self.live[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, key):
        self.now -= self.live.pop(key, 0)

    def _storages(self, tree):
        for leaf in tree_leaves(tree):
            if isinstance(leaf, torch.Tensor) and self.device in (None, leaf.device.type):
                yield leaf.untyped_storage()._cdata, leaf.untyped_storage()


def peak_bytes(call, *args, **options):
    with PeakBytes() as meter:
        call(*args, **options)
    return meter.peak
