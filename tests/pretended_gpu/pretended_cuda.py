"""A CUDA device for machines without one: tensors that say `cuda:0` and hold their numbers on the CPU.

What mixes the two devices raises, as on a GPU, and code that asks for the device goes the way it goes there.
Kernels, streams and the use of memory are not imitated: those are for tests/gpu.

Imported before ComfyUI, it stands for a GPU of 24 GiB in this process.
"""

import functools
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

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


KNOWN = frozenset((torch.Tensor, torch.nn.Parameter, CudaTensor))


class PretendedCuda(TorchDispatchMode):
    """Also catches what makes tensors, which has none among its arguments."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, types, args, kwargs or {})


def run(func, types, args, kwargs):
    """One operation, on the CPU, with its result on the device it would have."""
    if not KNOWN.issuperset(types):
        return NotImplemented  # another subclass, such as the host's quantised tensors, unpacks itself first
    if func is SAME_KIND:
        return False  # so that a parameter that moves is a new one
    if is_composite(func):
        with PretendedCuda():
            return func.decompose(*args, **kwargs)
    ours, others = {}, []  # CudaTensors by their `inner`; tensors of the CPU
    on_cuda = func is COPY_INTO and isinstance(args[0], CudaTensor)
    args = [inner(value, ours, others) for value in args]
    kwargs = {name: inner(value, ours, others) for name, value in kwargs.items()}
    if ours and others and func not in (COPY_TO, COPY_INTO):
        check_devices(func, others)
    if kwargs.get("device") is not None:
        on_cuda = torch.device(kwargs["device"]).type == "cuda"
        kwargs["device"] = CPU
    elif func is not COPY_INTO:
        on_cuda = bool(ours)
    if kwargs.get("pin_memory"):
        kwargs["pin_memory"] = False
    return named(func(*args, **kwargs), ours, on_cuda)


@functools.cache
def is_composite(func):
    """Whether it is made of other operations, which are taken one by one."""
    if func is ATTENTION:
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def inner(value, ours, others):
    """An argument with the tensors of the CPU that it holds."""
    if isinstance(value, CudaTensor):
        ours[id(value.inner)] = value
        return value.inner
    if isinstance(value, torch.Tensor):
        others.append(value)
    elif type(value) in (list, tuple):
        return type(value)(inner(one, ours, others) for one in value)
    return value


def named(result, ours, on_cuda):
    """A result under the name of the device that it would be on."""
    if isinstance(result, torch.Tensor):
        if id(result) in ours:
            return ours[id(result)]  # what was changed in place is the same object
        return CudaTensor(result) if on_cuda else result  # a view of `inner` stays one
    if type(result) in (list, tuple):
        return type(result)(named(one, ours, on_cuda) for one in result)
    return result


def check_devices(func, others):
    for t in others:
        if t.ndim:
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
