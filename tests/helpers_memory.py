"""How many bytes of tensors are alive, and how many are moved."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
PRODUCTS = {aten.addmm.default, aten.mm.default, aten.bmm.default, CONVOLUTION}
MAKES = {aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default}  # room, and nothing in it


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


def nbytes(tensors):
    """Bytes of the numbers in memory, each once: those that `expand` repeats are there once."""
    return sum(
        t.element_size() * torch.Size(n for n, step in zip(t.shape, t.stride()) if step).numel()
        for t in tensors
        if isinstance(t, torch.Tensor)
    )


class Moved(TorchDispatchMode):
    """Bytes that operations read and write, tensor by tensor, less those of products and convolutions.

    The bias of a convolution is counted: on a GPU it is added in a pass of its own.
    """

    def __init__(self):
        super().__init__()
        self.by_name = {}

    @property
    def bytes(self):
        return sum(self.by_name.values())

    def count(self, name, read, written):
        self.by_name[name] = self.by_name.get(name, 0) + nbytes(read) + nbytes(written)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = tree_leaves((args, kwargs)), tree_leaves(out)
        if func is aten.copy_.default:
            read = read[1:]
        places = {t.untyped_storage()._cdata for t in read if isinstance(t, torch.Tensor)}
        is_view = not func._schema.is_mutable and all(
            t.untyped_storage()._cdata in places for t in written if isinstance(t, torch.Tensor)
        )
        if func is CONVOLUTION and args[2] is not None:
            self.count("bias", [out], [out])
        if func not in PRODUCTS | MAKES and not is_view:
            self.count(str(func), read, written)
        return out
