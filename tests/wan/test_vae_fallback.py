"""Decoding of a part, and a decode that runs out of memory and goes on."""

from functools import partial
from itertools import accumulate

import pytest
import torch
from helpers import relative
from helpers_memory import peak_bytes
from helpers_vae import latents
from lib.random_weights import randomise
from torch.profiler import ProfilerActivity, profile
from wan21.wan.vae import WanVAE, cpu, memory
from wan21.wan.vae.fallback import Piece, decode_within_memory, on_cpu, smaller_tiles
from wan21.wan.vae.layers import AttentionBlock
from wan21.wan.vae.memory import choose_tile, decode_bytes, encode_bytes
from wan21.wan.vae.past import Past

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
H, W, T = 40, 1, 3  # 320 x 8 pixels: whole, then tiles of 256, 128 and 64


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def vae():
    return randomise(WanVAE(dim=8))


@pytest.fixture(scope="module")
def whole(vae):
    """(latent of two clips, their frames)."""
    with torch.no_grad():
        z = latents(T, H, W, batch=2)
        return z, torch.cat([vae.decode(clip) for clip in z.split(1)])


@pytest.fixture(scope="module")
def long_clip(vae):
    """(latent, frames) longer than the past that a frame depends on."""
    with torch.no_grad():
        z = latents(41, 1, 2)
        return z, vae.decode(z)


@pytest.mark.parametrize("first", [1, 30, 155, 160])
def test_a_part_from_any_frame_on_is_that_of_the_whole(vae, long_clip, first):
    z, expected = long_clip
    expected = expected[:, :, first:]
    part = torch.cat([chunk for _, chunk in vae.decode_part(z, first=first)], 2)
    assert relative(part, expected) <= 2e-6
    window = slice(0, 1), slice(1, 2)
    part = torch.cat([chunk for _, chunk in vae.decode_part(z, window, vae.features(z), first)], 2)
    assert relative(part, expected[..., 8:]) <= 2e-6


def test_a_late_part_costs_little(vae, long_clip):
    """Only the past that its frames depend on is computed again."""
    seen = []
    hook = vae.decoder.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    frames = [f for f, _ in vae.decode_part(long_clip[0], first=150)]
    hook.remove()
    assert frames[0] == 150
    assert sum(seen) == 161 - 150 + 14  # the last stage looks 14 frames back


class Memory:
    """A device on which the VAE's last residual block fits `limit` pixels a frame, after `calls` calls."""

    def __init__(self, vae, limit, calls=0):
        self.limit, self.calls = limit, calls
        self.hook = vae.decoder.upsamples[-1].register_forward_pre_hook(self)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()

    def __call__(self, block, args):
        self.calls -= 1
        if self.calls < 0 and args[0][0, 0, 0].numel() > self.limit:
            raise torch.OutOfMemoryError("simulated")


def decode(vae, whole, **options):
    """-> (frames, sentences, progress, frames as they were at each retreat)"""
    z, expected = whole
    out = torch.full_like(expected, float("nan"))
    said, counted, states = [], [], []

    def retreat(sentence):
        said.append(sentence)
        states.append(out.clone())

    decode_within_memory(
        vae, z, out, retreat=retreat, progress=lambda *count: counted.append(count), **options
    )
    return out, said, counted, states


@pytest.mark.parametrize("tile", [None, 0, 128])
def test_enough_memory_is_a_plain_decode(vae, whole, tile):
    out, said, counted, _ = decode(vae, whole, tile=tile)
    assert relative(out, whole[1]) <= 2e-6
    assert not said
    assert counted == sorted(counted) and counted[-1] == (18, 18)


@pytest.mark.parametrize("calls", [0, 2, 5])  # before the first frame, within the first clip, the second
@pytest.mark.parametrize(("limit", "steps"), [(2200, 1), (700, 3)])
def test_smaller_tiles_go_on_at_the_first_missing_frame(vae, whole, calls, limit, steps):
    with Memory(vae, limit, calls):
        out, said, counted, states = decode(vae, whole)
    assert relative(out, whole[1]) <= 2e-6
    assert [sentence.split("in ")[-1] for sentence in said] == [
        f"tiles of {size} pixels" for size in (256, 128, 64)[:steps]
    ]
    assert counted == sorted(counted) and counted[-1] == (18, 18)
    for state in states:  # what was decoded is not touched again
        done = ~state.isnan()
        assert torch.equal(out[done], state[done])
    assert states[0].isfinite().any() == bool(calls)


def test_the_last_resort_takes_what_is_left(vae, whole):
    twin = on_cpu(vae)
    windows = []
    twin.decode_part = lambda z, window, *rest, **more: (
        windows.append(window) or WanVAE.decode_part(twin, z, window, *rest, **more)
    )
    with Memory(vae, 0, calls=2):
        out, said, _, states = decode(vae, whole, last_resort=lambda: twin)
    assert relative(out, whole[1]) <= 2e-6
    assert said[-1].endswith("on the CPU")
    done = ~states[-1].isnan()
    assert done.any() and torch.equal(out[done], states[-1][done])
    assert windows == [None, None]  # no frame came out of the tiles, so it works on whole frames again


def test_the_last_resort_is_in_float32(vae):
    half = WanVAE(dim=8, dtype=torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    half.decoder.head.register_forward_pre_hook(fail_with(torch.OutOfMemoryError("simulated")))
    z = latents(2, 2, 2)
    out = torch.empty(half.decode_output_shape(z.shape))
    decode_within_memory(half, z.bfloat16(), out, last_resort=lambda: on_cpu(half))
    assert relative(out, on_cpu(half).decode(z.bfloat16().float())) <= 2e-6


def fail_with(error):
    def hook(module, args):
        raise error

    return hook


@pytest.mark.parametrize(
    ("error", "tried"),
    [
        (torch.OutOfMemoryError("no more"), 4),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 4),
        (RuntimeError("CUDA error: out of memory"), 4),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 4),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), 4),
        (RuntimeError("miopenStatusAllocFailed"), 4),
        (
            RuntimeError(
                "Could not allocate tensor with 8 bytes. There is not enough GPU video memory available!"
            ),
            4,
        ),
        (RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"), 4),
        (RuntimeError("level_zero backend failed with error: 40 (UR_RESULT_ERROR_OUT_OF_RESOURCES)"), 4),
        (RuntimeError("shapes do not fit"), 1),
        (RuntimeError("level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)"), 1),
        (ValueError("out of memory"), 1),
    ],
)
def test_other_errors_and_the_last_one_are_raised(vae, whole, error, tried):
    calls = []
    hook = vae.decoder.head.register_forward_pre_hook(lambda *_: calls.append(1))
    failing = vae.decoder.head.register_forward_pre_hook(fail_with(error))
    try:
        with pytest.raises(type(error)) as caught:
            decode(vae, whole)
        assert caught.value is error and len(calls) == tried
    finally:
        hook.remove()
        failing.remove()


def test_check_is_called_before_every_layer_and_strip(vae, monkeypatch):
    class Cancelled(BaseException):
        pass

    monkeypatch.setattr(cpu, "MIN_VOXELS", 1)
    blocks = []
    hook = vae.decoder.upsamples[-1].register_forward_pre_hook(lambda *_: blocks.append(1))

    def check():
        if blocks:
            raise Cancelled

    heads = []
    other = vae.decoder.head.register_forward_pre_hook(lambda *_: heads.append(1))
    for call in (vae.decode, vae.decode_tiled):
        blocks.clear()
        with pytest.raises(Cancelled):
            call(latents(1, 2, 2), check=check)
        assert blocks == [1] and not heads  # it stopped within the block
    hook.remove()
    other.remove()


def test_slow_layers_listen_more_than_once(vae):
    """Attention before each frame, doubling on the CPU before each frame."""
    calls = []

    class Past:
        def check(self):
            calls.append(1)

    attention = next(m for m in vae.modules() if isinstance(m, AttentionBlock))
    x = torch.zeros(1, attention.proj.out_channels, 3, 4, 4)
    attention(x, Past())
    assert len(calls) == 3
    conv = torch.nn.Conv2d(8, 4, 3, padding=1)
    calls.clear()
    with torch.inference_mode():
        cpu.upsample_conv(conv, torch.zeros(3, 8, 4, 4), Past().check)
    assert len(calls) == 3


def test_pieces_of_a_large_frame():
    assert smaller_tiles(None, 60, 104) == [512, 256, 128, 64]
    assert smaller_tiles(256, 60, 104) == [128, 64]
    halves = Piece(0, slice(0, 60), slice(0, 104), 5).cut(512)
    assert [(p.rows, p.columns, p.first) for p in halves] == [
        (slice(0, 60), slice(0, 52), 5),
        (slice(0, 60), slice(52, 104), 5),
    ]


def test_features_on_the_same_device_are_counted():
    vae = WanVAE(device="meta", dtype=torch.bfloat16)
    apart, here = (decode_bytes(vae, 60, 104, CUDA, 256, held_frames=t) for t in (0, 21))
    features = vae.features(torch.empty(1, 16, 21, 60, 104, device="meta", dtype=torch.bfloat16))
    assert here - apart == features.nbytes
    assert decode_bytes(vae, 60, 104, CUDA, held_frames=21) == decode_bytes(vae, 60, 104, CUDA)


@pytest.mark.parametrize("tile", [None, 64])
def test_the_estimate_is_near_what_is_taken(vae, tile, monkeypatch):
    monkeypatch.setattr(cpu, "STRIP_BYTES", 0)
    monkeypatch.setattr("wan21.wan.vae.memory.STRIP_BYTES", 0)
    z = latents(2, 20, 3)
    out = torch.empty(vae.decode_output_shape(z.shape))
    taken = peak_bytes(decode_within_memory, vae, z, out, tile)
    assert 0.6 < taken / decode_bytes(vae, 20, 3, CPU, tile) < 1.1


def test_the_estimate_for_cuda_is_an_upper_bound(vae, monkeypatch):
    """The plain way, as on AMD; what the library's convolutions take for themselves is not seen on a CPU."""
    monkeypatch.setattr(memory, "suits", lambda *_: False)
    half = WanVAE(dim=8, dtype=torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    z = latents(2, 20, 3).bfloat16()
    out = torch.empty(vae.decode_output_shape(z.shape))
    taken = peak_bytes(half.decode, z, out, chunk_frames=2)
    assert 0.6 < taken / decode_bytes(half, 20, 3, CUDA) <= 1


def convolved_by_columns(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """What a CUDA device does where cuDNN is off: torch.ops.aten, on the CPU."""
    return torch.ops.aten.slow_conv_dilated3d(x, weight, weight.shape[2:], bias, stride, padding, dilation)


def allocated_at_most(call, *args, **options):
    """Peak bytes of the CPU's allocator, also of what a kernel takes for itself."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        call(*args, **options)
    events = profiler.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_columns_are_counted_where_cudnn_is_off(vae, way, monkeypatch):
    monkeypatch.setattr("wan21.wan.vae.new_past", lambda device, dtype, check, is_plain: Past(check))
    monkeypatch.setattr(torch.nn.functional, "conv3d", convolved_by_columns)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    estimate = (
        partial(decode_bytes, vae, 12, 10) if way == "decode" else partial(encode_bytes, vae, 9, 96, 80)
    )
    x = latents(3, 12, 10) if way == "decode" else torch.zeros(1, 3, 9, 96, 80)
    taken = allocated_at_most(getattr(vae, way), x, chunk_frames=2)
    if way == "decode":
        taken -= 4 * 3 * 9 * 96 * 80  # the result
    assert 0.6 < taken / estimate(CUDA) <= 1
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    assert estimate(CUDA) < taken


def test_auto_takes_the_largest_tile_that_fits():
    vae = WanVAE(device="meta", dtype=torch.bfloat16)
    whole = decode_bytes(vae, 60, 104, CUDA)
    assert 2.5 < whole / 2**30 < 4  # 832x480 in bf16
    assert choose_tile(vae, 60, 104, CUDA, whole) is None
    assert choose_tile(vae, 60, 104, CUDA, whole - 1) == 512
    sizes = [choose_tile(vae, 60, 104, CUDA, free * 2**20) for free in range(4096, 0, -64)]
    assert sizes == sorted(sizes, key=lambda tile: -(tile or 9999))
    assert set(sizes) == {None, 512, 256, 128, 64}


@pytest.mark.parametrize("frames", [1, 17, 33])
def test_the_estimate_of_an_encode_is_near_what_is_taken(vae, frames, monkeypatch):
    monkeypatch.setattr(cpu, "STRIP_BYTES", 0)
    monkeypatch.setattr("wan21.wan.vae.memory.STRIP_BYTES", 0)
    x = torch.zeros(1, 3, frames, 160, 24)
    monkeypatch.setattr(memory, "suits", lambda *_: False)
    taken = peak_bytes(vae.encode, x)
    half = WanVAE(dim=8, dtype=torch.bfloat16)
    half.load_state_dict(vae.state_dict())
    taken_half = peak_bytes(half.encode, x.bfloat16(), chunk_frames=2)
    assert 0.6 < taken / encode_bytes(vae, frames, 160, 24, CPU) < 1.1, taken
    assert 0.6 < taken_half / encode_bytes(half, frames, 160, 24, CUDA) <= 1, taken_half
