"""`comfy_aimdo`, by which ComfyUI brings weights to an NVIDIA GPU at their use, on the pretended one.

The host's Python runs as it is; the library behind it, which talks to the driver, is a few buffers here.
`RESIDENT` bytes of a model stay on the device; the rest is copied there again at every use.
"""

import ctypes
import mmap
import os

import comfy_aimdo.control
import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import numpy
import torch
from pretended_cuda import CudaTensor

RESIDENT = 2**20  # the first layers; most of the bundled DiT's 18 MB do not stay


class ModelVBAR:
    """The device addresses of a model's weights; `alloc` gives (self, offset, bytes)."""

    def __init__(self, size, device):
        self.places = {}
        self.offset = 0

    def alloc(self, size):
        place = self.offset
        self.offset += -(-size // 512) * 512
        self.places[place] = torch.empty(size, dtype=torch.uint8)
        return self, place, size

    def bytes_at(self, place, size):
        return self.places[place][:size]

    def fault(self, place, size):
        return (ctypes.c_uint32 * 1)(1) if place + size <= RESIDENT else None

    def loaded_size(self):
        return min(RESIDENT, self.offset)

    def free_memory(self, size):
        return 0

    def unpin(self, place, size):
        pass

    def prioritize(self):
        pass


class VRAMBuffer:
    """Room for what is copied at each use."""

    def __init__(self, size, device):
        self.memory = torch.empty(2**26, dtype=torch.uint8)

    def size(self):
        return len(self.memory)

    def get(self, size, offset=0):
        return self, offset, size

    def bytes_at(self, place, size):
        return self.memory[place : place + size]


class HostBuffer:
    """Pinned memory of the CPU."""

    def __init__(self, size, prewarm=0, max_grow_size=0, mark_cold=True):
        self.memory = torch.empty(max(int(size), int(max_grow_size)), dtype=torch.uint8)
        self.size = int(size)

    def get_raw_address(self):
        return self.memory.data_ptr()

    def read_file_slice(self, file, file_offset, size, offset=0, stream=0, device_ptr=0, device=None):
        for address in (self.get_raw_address() + offset, device_ptr):
            if address:
                read_into(file, file_offset, size, address)

    def extend(self, size, reallocate=False, register=True):
        self.size += int(size)

    def truncate(self, size, do_unregister=True):
        self.size = int(size)


class ModelMMAP:
    """A file, mapped read-only as the library maps it: what writes to it ends the process."""

    def __init__(self, path):
        self.file = os.open(path, os.O_RDONLY)
        self.bytes = numpy.frombuffer(mmap.mmap(self.file, 0, access=mmap.ACCESS_READ), numpy.uint8)

    def get(self):
        return self.bytes.ctypes.data

    def get_file_handle(self):
        return self.file

    def bounce(self):
        pass

    def __del__(self):
        os.close(self.file)


slices_read = set()  # (offset in a file, bytes), of all that were read


def read_into(file, offset, size, address):
    """A part of a file into memory."""
    slices_read.add((offset, size))
    assert os.preadv(file, [(ctypes.c_char * size).from_address(address)], offset) == size


def read_file_to_device(file, offset, size, stream, address, device, mark_cold=True):
    read_into(file, offset, size, address)


def install():
    """In place of the library, before ComfyUI asks for it."""
    control = comfy_aimdo.control
    control.init = control.init_devices = lambda *args, **kwargs: True
    for level in ("critical", "error", "warning", "info", "detail", "debug"):
        setattr(control, f"set_log_{level}", lambda: None)
    comfy_aimdo.model_vbar.ModelVBAR = ModelVBAR
    comfy_aimdo.model_vbar.vbars_analyze = lambda device=None: 0
    comfy_aimdo.model_vbar.vbars_reset_watermark_limits = lambda: None
    comfy_aimdo.model_mmap.ModelMMAP = ModelMMAP
    comfy_aimdo.vram_buffer.VRAMBuffer = VRAMBuffer
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.host_buffer.read_file_to_device = read_file_to_device
    comfy_aimdo.torch.aimdo_to_tensor = lambda alloc, device: CudaTensor(alloc[0].bytes_at(*alloc[1:]))
    comfy_aimdo.torch.hostbuf_to_tensor = lambda buffer: buffer.memory[: buffer.size]
