"""A CUDA device for machines without one: tensors that say `cuda:0` and hold their numbers on the CPU.

What mixes the two devices raises, as on a GPU, and code that asks for the device goes the way it goes there.
Kernels, streams and the use of memory are not imitated: those are for tests/gpu.

Imported before ComfyUI, it stands for a GPU of 24 GiB in this process.
"""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
GIB = 2**30
COPY_TO, COPY_INTO = aten._to_copy.default, aten.copy_.default  # they may mix devices
ATTENTION = aten.scaled_dot_product_attention.default  # whole: it would pick a kernel of the GPU's
SAME_KIND = aten._has_compatible_shallow_copy_type.default


class CudaTensor(torch.Tensor):
    """`inner`, on the CPU, under another device's name."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )

    def __init__(self, inner):
        self.inner = inner

    def __repr__(self, **kwargs):
        return f"CudaTensor({self.inner!r})"

    def data_ptr(self):
        return self.inner.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, types, args, kwargs or {})


class PretendedCuda(TorchDispatchMode):
    """Also catches what makes tensors, which has none among its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, types, args, kwargs or {})


def run(func, types, args, kwargs):
    """One operation, on the CPU, with its result on the device it would have."""
    if any(t not in (torch.Tensor, torch.nn.Parameter, CudaTensor) for t in types):
        return NotImplemented  # another subclass, such as the host's quantised tensors, unpacks itself first
    if func is SAME_KIND:
        return False  # so that a parameter that moves is a new one
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    if composite and func is not ATTENTION:
        with PretendedCuda():
            return func.decompose(*args, **kwargs)
    flat, spec = tree_flatten((args, kwargs))
    ours = {id(t.inner): t for t in flat if isinstance(t, CudaTensor)}
    if ours and func not in (COPY_TO, COPY_INTO):
        check_devices(func, flat)
    if "device" in kwargs and kwargs["device"] is not None:
        on_cuda = torch.device(kwargs["device"]).type == "cuda"
    else:
        on_cuda = isinstance(args[0], CudaTensor) if func is COPY_INTO else bool(ours)
    args, kwargs = tree_unflatten([t.inner if isinstance(t, CudaTensor) else t for t in flat], spec)
    kwargs |= {"device": CPU} if kwargs.get("device") is not None else {}
    kwargs |= {"pin_memory": False} if kwargs.get("pin_memory") else {}

    def named(t):
        if not isinstance(t, torch.Tensor) or id(t) in ours:
            return ours.get(id(t), t)  # what was changed in place is the same object
        return CudaTensor(t) if on_cuda else t  # a view of `inner` stays one

    return tree_map(named, func(*args, **kwargs))


def check_devices(func, flat):
    for t in flat:
        if isinstance(t, torch.Tensor) and not isinstance(t, CudaTensor) and t.ndim:
            raise RuntimeError(f"{func}: a tensor {tuple(t.shape)} on the CPU beside others on {CUDA}")


class Nothing:
    """A stream or an event."""

    def __init__(self, *args, **kwargs):
        self.device = CUDA

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: 0


PROPERTIES = SimpleNamespace(
    name="pretended", major=8, minor=6, total_memory=24 * GIB, multi_processor_count=80, gcnArchName=""
)
ANSWERS = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": PROPERTIES.name,
    "get_device_properties": PROPERTIES,
    "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
    "get_allocator_backend": "native",
    "mem_get_info": (20 * GIB, 24 * GIB),
    "memory_stats": {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0},
    "max_memory_allocated": GIB,
    "current_stream": Nothing(),
    "stream": nullcontext(),
    "cudart": Nothing(),
    **dict.fromkeys(("set_device", "synchronize", "empty_cache", "ipc_collect", "_lazy_init")),
    "reset_peak_memory_stats": None,
}


def set_data(parameter, value):
    """`parameter.data = value`, which PyTorch refuses for a subclass."""
    if isinstance(value, CudaTensor) or isinstance(parameter, CudaTensor):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(value, requires_grad=False))
    else:
        torch.Tensor.data.__set__(parameter, value)


def begin():
    """In this thread, from here on."""
    torch._C._set_only_lift_cpu_tensors(True)
    PretendedCuda().__enter__()


def install():
    """Answers of `torch.cuda`, and the mode in every thread that starts later."""
    torch._C._ensureCUDADeviceGuardSet()
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, lambda *args, _answer=answer, **kwargs: _answer)
    torch.cuda.Stream = torch.cuda.Event = Nothing
    CudaTensor.data = torch.nn.Parameter.data = property(torch.Tensor.data.__get__, set_data)
    run_thread = threading.Thread.run

    def run_on_cuda(thread):
        begin()
        run_thread(thread)

    threading.Thread.run = run_on_cuda


install()
