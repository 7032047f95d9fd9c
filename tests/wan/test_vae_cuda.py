"""The VAE's way on NVIDIA GPUs, on the CPU: the numbers of the plain one, and channels last throughout."""

from functools import partial

import pytest
import torch
from helpers import relative
from helpers_memory import Moved, peak_bytes
from helpers_vae import latents, pixels
from lib.random_weights import randomise
from wan21.wan.vae import WanVAE, cuda, memory
from wan21.wan.vae.fallback import decode_within_memory
from wan21.wan.vae.layers import AttentionBlock
from wan21.wan.vae.past import Past
from wan21.wan.vae.stream import CHUNK_FRAMES

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=8))


@pytest.fixture
def on_gpu(monkeypatch):
    """`on_gpu(True)` takes the GPU's way on every device, `on_gpu(False)` the plain one."""

    def switch(on):
        made = cuda.CudaPast if on else Past
        monkeypatch.setattr("wan21.wan.vae.new_past", lambda device, dtype, check, is_plain: made(check))

    return switch


def both_ways(vae, on_gpu, batch=1, **options):
    """(ours, plain) of a decode and an encode."""
    z, x = latents(3, 3, 4, batch), pixels(9, 24, 32, batch)
    found = []
    for on in (True, False):
        on_gpu(on)
        found.append((vae.decode(z, **options), vae.encode(x, **options)))
    return zip(*found)


@pytest.mark.parametrize("batch, chunk_frames", [(1, 1), (1, 2), (2, 4), (1, 100)])
def test_numbers_are_those_of_the_plain_way(vae, on_gpu, batch, chunk_frames):
    for ours, plain in both_ways(vae, on_gpu, batch, chunk_frames=chunk_frames):
        assert 0 < relative(ours, plain) <= 5e-6


def test_every_convolution_reads_channels_last(vae, on_gpu, monkeypatch):
    seen = []

    def watched(conv):
        def watch(x, weight, *args, **kwargs):
            layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
            seen.append(x.is_contiguous(memory_format=layout))
            return conv(x, weight, *args, **kwargs).contiguous(memory_format=layout)  # as cuDNN gives it

        return watch

    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(torch.nn.functional, name, watched(getattr(torch.nn.functional, name)))
    on_gpu(True)
    vae.decode(latents(5, 5, 7), chunk_frames=4)
    assert len(seen) > 100 and all(seen)
    seen.clear()
    vae.encode(pixels(17, 40, 56), chunk_frames=4)
    # Of a chunk of one frame, as the last here, PyTorch cannot always tell how it lies.
    assert len(seen) > 100 and sum(seen) > 0.9 * len(seen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1, 1), (2, 8, 3)])
def test_phases_are_the_doubled_picture_convolved(dtype, shape):
    """In 16 bits about twice as far from the exact sum as the direct way: the folded filters are rounded."""
    n, h, w = shape
    conv = randomise(torch.nn.Conv2d(16, 8, 3, padding=1)).to(dtype)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 16, h, w, generator=g).to(dtype).contiguous(memory_format=torch.channels_last)
    double = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact")
    ours = cuda.doubled_and_convolved(x, conv.weight, conv.bias)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    direct = conv(double)
    exact = conv.double()(double.double())
    limit = 1e-6 if dtype == torch.float32 else 3 * relative(direct, exact)
    assert relative(ours, exact) <= limit


def doubled(layer):
    layer.forward = lambda x: type(layer).forward(layer, x) * 2


def hooked(layer):
    layer.register_forward_hook(lambda layer, inputs, output: output * 2)


@pytest.mark.parametrize("change", [doubled, hooked])
def test_a_changed_convolution_is_called(on_gpu, change):
    vae = randomise(WanVAE(dim=8))
    on_gpu(True)
    plain = vae.decode(latents(3))
    for layer in (vae.decoder.upsamples[3].resample[1], vae.decoder.upsamples[4].residual[2]):
        change(layer)
    (ours, expected), _ = both_ways(vae, on_gpu)
    assert relative(ours, expected) <= 5e-6
    on_gpu(True)
    assert relative(vae.decode(latents(3)), plain) > 1e-3


def room_of_convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, moved=None):
    """A result without numbers, as cuDNN lays it out. A bias is added in a pass of its own."""
    count = x.ndim - 2
    steps, pads = (n if isinstance(n, tuple) else (n,) * count for n in (stride, padding))
    sides = zip(x.shape[2:], weight.shape[2:], steps, pads)
    shape = [(side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides]
    layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    y = torch.empty((len(x), len(weight), *shape), dtype=x.dtype, device=x.device, memory_format=layout)
    if moved is not None and bias is not None:
        moved.count("bias", [y], [y])
    return y


@pytest.mark.parametrize("chunk", [2, 4])
@pytest.mark.parametrize(
    "way, tile, t", [("decode", None, 5), ("decode", 128, 5), ("encode", None, 5), ("encode", None, 1)]
)
def test_the_estimate_is_near_the_counted_tensors(on_gpu, way, tile, t, chunk, monkeypatch):
    on_gpu(True)
    monkeypatch.setattr(memory, "suits", lambda device, itemsize: True)
    monkeypatch.setattr(AttentionBlock, "attend", staticmethod(lambda q, k, v: torch.empty_like(q)))
    monkeypatch.setattr(cuda, "_kernel", lambda *_: lambda *_: None)
    monkeypatch.setitem(CHUNK_FRAMES, "cpu", chunk)
    for name in ("conv2d", "conv3d"):
        monkeypatch.setattr(torch.nn.functional, name, room_of_convolution)
    vae, h, w = WanVAE(dim=8), 20, 24
    if way == "decode":
        z, out = torch.zeros(1, 16, t, h, w), torch.empty(1, 3, 4 * t - 3, 8 * h, 8 * w)
        real = peak_bytes(decode_within_memory, vae, z, out, tile)
        estimate = memory.decode_bytes(vae, h, w, CUDA, tile, held_frames=t, chunk_frames=chunk)
    else:
        real = peak_bytes(vae.encode, torch.zeros(1, 3, 4 * t - 3, 8 * h, 8 * w))
        estimate = memory.encode_bytes(vae, 4 * t - 3, 8 * h, 8 * w, CUDA, chunk_frames=chunk)
    most = 1.15 if t > 1 else 1.5  # of a picture hardly anything is kept
    assert 1 <= estimate / real < most, (estimate / 2**20, real / 2**20)


def kernels_room(moved):
    """The kernels as far as memory goes: test_kernels.py counts what the real ones load and store."""

    def norm_silu(x, gamma, scale, out):
        moved.count("norm_silu", [x, gamma], [out])

    def add_bias(y, bias, add_to):
        moved.count("add_bias", [y, bias, add_to], [y])

    return {"norm_silu": norm_silu, "add_bias": add_bias}


def moved_by_a_frame(monkeypatch, way, kernels):
    """Bytes a frame of 832x480 in the middle of a clip, four at once; tensors without data."""
    with torch.device("meta"):
        vae = WanVAE(dtype=torch.bfloat16)

    def moved_by(t):
        moved = Moved()
        room = kernels_room(moved) if kernels else {}
        monkeypatch.setattr(cuda, "_kernel", lambda name, *_: room.get(name))
        for name in ("conv2d", "conv3d"):
            monkeypatch.setattr(torch.nn.functional, name, partial(room_of_convolution, moved=moved))
        shape = (1, 16, t, 60, 104) if way == "decode" else (1, 3, 4 * t - 3, 480, 832)
        given = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        with moved:
            getattr(vae, way)(given, chunk_frames=4)
        return moved

    short, long = moved_by(3), moved_by(7)
    return (long.bytes - short.bytes) / 16, long.by_name


BYTES = [
    ("decode", True, True, 5.9),
    ("decode", True, False, 12.7),
    ("decode", False, False, 13.5),
    ("encode", True, True, 4.0),
    ("encode", False, False, 8.5),
]


@pytest.mark.parametrize("way, on, kernels, most", BYTES)
def test_bytes_between_the_convolutions(on_gpu, monkeypatch, way, on, kernels, most):
    """GB a frame."""
    on_gpu(on)
    monkeypatch.setattr(AttentionBlock, "attend", staticmethod(lambda q, k, v: torch.empty_like(q)))
    moved, by_name = moved_by_a_frame(monkeypatch, way, kernels)
    assert 0.97 * most < moved / 1e9 <= most, by_name


SUITS = [
    ({}, 2, True),
    ({}, 4, True),
    ({}, 8, False),
    ({"device": "cpu"}, 2, False),
    ({"hip": "6.4"}, 2, False),  # the same name of the device on AMD
    ({"cudnn": False}, 2, False),
    ({"capability": (7, 5)}, 2, True),
    ({"capability": (7, 5)}, 4, False),  # no TF32
    ({"tf32": False}, 4, False),
]


@pytest.mark.parametrize("case, itemsize, expected", SUITS)
def test_where_it_is_taken(monkeypatch, case, itemsize, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: case.get("capability", (9, 0)))
    monkeypatch.setattr(torch.version, "hip", case.get("hip"))
    monkeypatch.setattr(torch.backends.cudnn, "enabled", case.get("cudnn", True))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", case.get("tf32", True))
    assert cuda.suits(torch.device(case.get("device", CUDA)), itemsize) == expected
