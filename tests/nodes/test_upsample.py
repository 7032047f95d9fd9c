"""Wan21SpatialUpsample and Wan21TemporalUpsample, with real models of the host in random weights."""

import math
import threading
import time

import comfy.model_management
import folder_paths
import pytest
import torch
from lib.quality import psnr
from safetensors.torch import save_file
from wan21.frames import minterpolate
from wan21.host import upsample as host_upsample
from wan21.nodes.upsample import Wan21SpatialUpsample, Wan21TemporalUpsample
from wan21.wan.refusal import Refusal


def clip(count, height=48, width=64, step=1.0):
    """A textured picture that moves `step` pixels a frame to the right, exactly: [count, H, W, 3]."""
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(1, 3, k, 3 * k, generator=generator) for k in (4, 8, 16)]
    size = (height, 3 * width)
    wide = sum(torch.nn.functional.interpolate(x, size=size, mode="bicubic") for x in layers) / len(layers)
    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.arange(width) + 8.0, indexing="ij")
    frames = [
        torch.nn.functional.grid_sample(
            wide, torch.stack([(x + i * step) * 2 / (size[1] - 1) - 1, y], -1)[None],
            mode="bicubic", align_corners=True,
        )
        for i in range(count)
    ]  # fmt: skip
    return torch.cat(frames).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def temporal(images, fps=16.0, method="x2", **inputs):
    return Wan21TemporalUpsample.execute(images, fps, method, **inputs).result


def spatial(images, method, **inputs):
    return Wan21SpatialUpsample.execute(images, method, **inputs).result[0]


@pytest.fixture
def load_upscaler(tmp_path):
    """Makes a small random upscaler (Real-ESRGAN's compact net) and loads it by the host's own node."""
    from comfy_extras.nodes_upscale_model import UpscaleModelLoader
    from spandrel.architectures.Compact import Compact

    def load(scale):
        torch.manual_seed(0)
        net = Compact(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=scale)
        save_file(net.state_dict(), tmp_path / f"x{scale}.safetensors")
        folder_paths.add_model_folder_path("upscale_models", str(tmp_path))
        return UpscaleModelLoader.execute(f"x{scale}.safetensors").result[0]

    return load


@pytest.fixture
def upscale_model(load_upscaler):
    return load_upscaler(2)


@pytest.fixture(params=["rife", "film"])
def interpolation_model(request):
    """A small random RIFE or FILM of the host, as its loader wraps it."""
    from comfy.model_patcher import CoreModelPatcher
    from comfy_extras.frame_interpolation_models.film_net import FILMNet
    from comfy_extras.frame_interpolation_models.ifnet import IFNet

    torch.manual_seed(0)
    if request.param == "rife":
        net = IFNet(head_ch=4, channels=(8,) * 5)
    else:
        net = FILMNet(filters=8, flow_filters=(8, 8, 8, 8))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return CoreModelPatcher(net.eval(), torch.device("cpu"), torch.device("cpu"))


@pytest.mark.parametrize(
    "method, size", [("none", (30, 41)), ("lanczos1.5", (46, 62)), ("lanczos2", (60, 82))]
)
def test_sizes(method, size):
    images = clip(3, 30, 41)
    found = spatial(images, method)
    assert found.shape == (3, *size, 3) and found.dtype == images.dtype
    assert found.min() >= 0 and found.max() <= 1


def test_lanczos_frames_do_not_depend_on_the_batch(monkeypatch):
    images = clip(5)
    expected = spatial(images, "lanczos2")
    monkeypatch.setattr(host_upsample, "_batch", lambda device, frame_bytes, free: 2)
    assert torch.equal(spatial(images, "lanczos2"), expected)


def test_model_equals_the_hosts_node(upscale_model):
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    images = clip(3)
    assert torch.allclose(
        spatial(images, "model", upscale_model=upscale_model),
        ImageUpscaleWithModel.execute(upscale_model, images).result[0], atol=1e-6,
    )  # fmt: skip


def test_odd_sides_of_a_model_lose_a_line(load_upscaler):
    from comfy_extras.nodes_upscale_model import ImageUpscaleWithModel

    model, images = load_upscaler(3), clip(2, 31, 44)
    found = spatial(images, "model", upscale_model=model)
    assert found.shape == (2, 92, 132, 3)
    whole = ImageUpscaleWithModel.execute(model, images).result[0]
    assert torch.allclose(found, whole[:, :92, :132], atol=1e-6)


class SmallMemory:
    """An upscaler that runs out of memory above some pixels, as CUDA does."""

    input_channels = output_channels = 3
    scale = 2

    def __init__(self, upscaler, pixels, error=None):
        self.upscaler, self.pixels, self.asked = upscaler, pixels, []
        self.error = error or torch.OutOfMemoryError("out of memory")
        self.model, self.patcher = upscaler.model, upscaler.patcher

    def __call__(self, x):
        self.asked.append((x.shape[0], *x.shape[2:]))
        if x.shape[0] * x.shape[2] * x.shape[3] > self.pixels:
            raise self.error
        return self.upscaler(x)


def test_out_of_memory_makes_batch_then_tile_smaller(upscale_model, monkeypatch):
    monkeypatch.setattr(host_upsample, "_batch", lambda device, frame_bytes, free: 4)
    images = clip(5, 150, 200)
    small = SmallMemory(upscale_model, pixels=150 * 160)
    found = spatial(images, "model", upscale_model=small)
    whole = spatial(images, "model", upscale_model=upscale_model)
    assert [asked[0] for asked in small.asked[:3]] == [4, 2, 1]
    assert small.asked[-1][1:] == (128, 128) and (found - whole).abs().mean() < 1e-3
    failed = sum(b * h * w > small.pixels for b, h, w in small.asked)
    assert failed <= 3 + len(host_upsample.TILES)  # later frames start from what fitted
    with pytest.raises(ValueError, match=r"out of memory .* tiles of 128.*smaller model"):
        spatial(images, "model", upscale_model=SmallMemory(upscale_model, pixels=100))


def test_cudnns_words_for_no_memory_make_it_smaller_too(upscale_model):
    error = RuntimeError("GET was unable to find an engine to execute this computation")
    small = SmallMemory(upscale_model, 130 * 130, error)
    assert spatial(clip(1, 150, 200), "model", upscale_model=small).shape == (1, 300, 400, 3)
    assert small.asked[-1][1:] == (128, 128)
    with pytest.raises(RuntimeError, match="a bug"):
        spatial(clip(1), "model", upscale_model=SmallMemory(upscale_model, 1, RuntimeError("a bug")))


def test_missing_model_is_named():
    with pytest.raises(ValueError, match=r"upscale_model is not connected\. Connect Load Upscale Model"):
        spatial(clip(2), "model")


def test_a_missing_model_is_known_before_anything_runs():
    """The host leaves an input without a link out, and gives None for one with a link."""
    check = Wan21SpatialUpsample.validate_inputs
    with pytest.raises(Refusal, match="upscale_model is not connected"):
        check(method="model")
    with pytest.raises(Refusal, match=r"it is one of none, lanczos1\.5"):
        check(method="bicubic")
    assert check(method="model", upscale_model=None) is True
    assert check(method="lanczos2") is True and check(method=None) is True


def test_what_does_not_fit_into_host_memory_is_refused(upscale_model, monkeypatch):
    images = clip(3)
    monkeypatch.setattr("wan21.host.memory._free_host_bytes", lambda: 100_000)
    with pytest.raises(ValueError, match=r"^Wan21SpatialUpsample: 3 frames of 128x96 take 0\.0 GB of host"):
        spatial(images, "model", upscale_model=upscale_model)
    with pytest.raises(ValueError, match=r"^Wan21SpatialUpsample: 3 frames of 96x72"):
        spatial(images, "lanczos1.5")
    with pytest.raises(ValueError, match=r"^Wan21TemporalUpsample: 5 frames of 64x48"):
        temporal(images)


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.zeros(2, 8, 8, 4), "4 channel.*SplitImageWithAlpha"),
        (torch.zeros(2, 8, 8, 1), "1 channel"),
        (torch.zeros(0, 8, 8, 3), "shape"),
        (torch.full((2, 8, 8, 3), math.nan), "frame 0 of images holds NaN"),
    ],
)
def test_wrong_images_are_named(images, message):
    with pytest.raises(ValueError, match=f"Wan21SpatialUpsample: .*{message}"):
        spatial(images, "lanczos2")
    with pytest.raises(ValueError, match=f"Wan21TemporalUpsample: .*{message}"):
        temporal(images)


@pytest.mark.parametrize("fps", [0.0, -16.0, math.nan, math.inf])
def test_wrong_fps_is_named(fps):
    with pytest.raises(ValueError, match=r"Wan21TemporalUpsample: fps is .*Set 16"):
        temporal(clip(2), fps)


def test_a_single_frame_is_named():
    with pytest.raises(ValueError, match=r"images holds 1 frame.*at least 2"):
        temporal(clip(1))


@pytest.mark.parametrize("method, multiplier", [("x2", 2), ("x4", 4)])
@pytest.mark.parametrize("count", [2, 3, 12])
def test_frames_fps_and_motion(method, multiplier, count):
    """Also for the last pair, which FFmpeg's filter drops, and across the border of two tasks."""
    images = clip(count, step=4)
    found, fps = temporal(images, 16.0, method)
    assert found.shape == ((count - 1) * multiplier + 1, 48, 64, 3) and fps == 16 * multiplier
    assert torch.equal(found[::multiplier], images)
    true = clip(len(found), step=4 / multiplier)
    blended = (images[:-1] + images[1:]) / 2
    for i in range(count - 1):
        middle = i * multiplier + multiplier // 2
        assert psnr(found[middle], true[middle]) > psnr(blended[i], true[middle]) + 3


def test_hundreds_of_frames_keep_moving():
    """Wan2GP took every pair after frame 100 for duplicates."""
    images = clip(130, 16, 32, step=0.5)
    found, _ = temporal(images)
    assert len(found) == 259 and torch.equal(found[::2], images)
    true = clip(259, 16, 32, step=0.25)
    errors = (found - true).square().mean(dim=(1, 2, 3))
    assert errors[201:].mean() < 2 * errors[:201].mean() + 1e-6
    steps = (found[1:] - found[:-1]).abs().mean(dim=(1, 2, 3))
    assert steps[200:].min() > 0.2 * steps.median()


@pytest.mark.parametrize("height, width", [(17, 23), (5, 3), (33, 64)])
def test_odd_sizes(height, width):
    images = clip(3, height, width, step=0.5)
    found, _ = temporal(images)
    assert found.shape == (5, height, width, 3)
    assert psnr(found[1::2], (images[:-1] + images[1:]) / 2) > 25


def test_cuts_repeat_the_nearer_frame():
    a, b = clip(3), clip(3).flip(2).roll(20, 1)
    images = torch.cat([a, 1 - b])
    found, _ = temporal(images, method="x4")
    assert torch.equal(found[9], a[2]) and torch.equal(found[10], a[2])
    assert torch.equal(found[11], images[3]) and torch.equal(found[::4], images)
    morphed, _ = temporal(images, method="x4", scene_cut_threshold=1.0)
    assert not torch.equal(morphed[10], a[2])


def test_a_duplicate_is_bridged():
    images = clip(7, step=2)
    images[3] = images[2]
    found, _ = temporal(images)
    true = clip(13, step=1)
    assert psnr(found[6], true[6]) > psnr(images[3], true[6]) + 6
    assert torch.equal(found[[0, 2, 4, 8, 10, 12]], images[[0, 1, 2, 4, 5, 6]])


def test_threads_do_not_change_the_frames(monkeypatch):
    images = clip(20, step=3)
    one, _ = temporal(images)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(temporal(images)[0], one)


@pytest.mark.parametrize("method, multiplier", [("x2", 2), ("x4", 4)])
def test_interpolation_model_equals_the_hosts_node(interpolation_model, method, multiplier):
    from comfy_extras.nodes_frame_interpolation import FrameInterpolate

    images = clip(4, 64, 128)
    found, _ = temporal(images, method=method, interpolation_model=interpolation_model)
    expected = FrameInterpolate.execute(interpolation_model, images, multiplier).result[0]
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(found[::multiplier], images)


def test_interpolation_model_on_odd_and_small_sizes_and_cuts(interpolation_model):
    images = torch.cat([clip(2, 17, 23), 1 - clip(2, 17, 23).roll(9, 2)])
    found, fps = temporal(images, 8.0, interpolation_model=interpolation_model)
    assert found.shape == (7, 17, 23, 3) and fps == 16 and torch.isfinite(found).all()
    assert torch.equal(found[3], images[1]) and not torch.equal(found[1], images[0])


@pytest.fixture
def cancel_soon():
    """Cancels the job after a moment, as the host's button does. -> the CPU time it was pressed at

    FFmpeg works in this process, and a busy machine does not lengthen its CPU time.
    """
    pressed = []

    def press():
        pressed.append(time.process_time())
        comfy.model_management.interrupt_current_processing(True)

    timer = threading.Timer(0.5, press)
    timer.start()
    yield pressed
    timer.cancel()
    timer.join()
    comfy.model_management.interrupt_current_processing(False)


def test_cancel_while_ffmpeg_works(cancel_soon):
    images = clip(33, 240, 416)  # several times the work that a fast machine does before the cancel
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        temporal(images, method="x4")
    assert time.process_time() - cancel_soon[0] < 1
    waiting = time.perf_counter() + 120
    while any(thread.name.startswith("minterpolate") for thread in threading.enumerate()):
        assert time.perf_counter() < waiting, "FFmpeg went on"
        time.sleep(0.05)


def test_cancel_inside_an_upscale_model(upscale_model, cancel_soon):
    body = upscale_model.model.body
    body[0].register_forward_hook(lambda *_: time.sleep(0.8))  # cancelled during the first of five layers
    seen = []
    body[-1].register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        spatial(clip(2), "model", upscale_model=upscale_model)
    assert not seen
    assert not any(part._forward_pre_hooks for part in upscale_model.model.modules())


def test_minterpolate_is_there():
    assert minterpolate.available()
