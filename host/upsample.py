"""The host's upscale models (spandrel) and frame interpolation models (RIFE, FILM), on its device."""

from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as memory
import torch
import torch.nn.functional as F
from comfy_extras.nodes_frame_interpolation import FrameInterpolationModel

from ..frames.lanczos import even_side, lanczos, upscale_tiled
from ..wan.refusal import Refusal
from .memory import need_host_bytes, raise_unless_out_of_memory
from .progress import Progress, check_cancelled

InterpolationModel = FrameInterpolationModel  # the socket type INTERP_MODEL
TILES = (1024, 768, 512, 384, 256, 192, 128)  # pixels of a side before upscaling
TILE_OVERLAP = 32
MAX_BATCH = 16
# Bytes an upscale model takes at most for each pixel of its input and each step of its scale: the estimate of
# the host's ImageUpscaleWithModel, 384 float32 values for each channel.
MODEL_BYTES = 3 * 4 * 384
# RIFE halves its input four times below its coarsest scale of 16, FILM six times: both end at 1/64.
INTERPOLATION_ALIGN = 64


@dataclass
class Room:
    """How much is computed at once: frames of a batch, and pixels of a tile's side (0: no tiles)."""

    batch: int
    tile: int = 0

    def shrink(self):
        """Ask for less after running out of memory. Returns whether that was possible."""
        smaller = [tile for tile in TILES if tile < self.tile]
        if self.batch > 1:
            self.batch //= 2
        elif smaller:
            self.tile = smaller[0]
        else:
            return False
        return True


def upscale_lanczos(images, scale):
    """Resize [F, H, W, 3] on the device. Sides of the result are even, the nearest to `side * scale`."""
    device = memory.get_torch_device()
    height, width = (even_side(side, scale) for side in images.shape[1:3])
    frame_bytes = 4 * 3 * 4 * height * width  # float32: source, first pass, second pass, one matrix product
    memory.free_memory(2 * frame_bytes, device)
    room = Room(_batch(device, frame_bytes, memory.get_free_memory(device)))
    return _map_frames(images, (height, width), lambda x: lanczos(x, height, width), room, device)


def upscale_with_model(model, images):
    """Run an UPSCALE_MODEL over [F, H, W, 3]. A last row or column that would make a side odd is left out."""
    device = model.patcher.load_device
    pixel_bytes = MODEL_BYTES * max(model.scale, 1)
    memory.load_models_gpu([model.patcher], memory_required=512 * 512 * pixel_bytes)
    sides = images.shape[1:3]
    room = _room_for_model(device, sides, pixel_bytes, model.patcher.get_free_memory(device))

    def upscale(x):
        return upscale_tiled(model, x, model.scale, room.tile, TILE_OVERLAP, check_cancelled)

    height, width = (side * model.scale // 2 * 2 for side in sides)
    with cancel_inside(model.model):
        return _map_frames(images, (height, width), upscale, room, device)


def no_upscale_model():
    """The refusal of the method `model` without one."""
    return Refusal(
        "method is model and upscale_model is not connected",
        "Connect Load Upscale Model (UpscaleModelLoader), or choose lanczos1.5 or lanczos2",
    )


def check_upscale_model(model):
    """Whether the input is an RGB upscaler as the host's UpscaleModelLoader gives it."""
    if model is None:
        raise no_upscale_model()
    if not hasattr(model, "patcher") or not hasattr(model, "scale"):
        raise Refusal(
            f"upscale_model is a {type(model).__name__}", "Load it with the host's Load Upscale Model"
        )
    channels = (model.input_channels, model.output_channels)
    if channels != (3, 3):
        raise Refusal(
            f"the upscale model reads {channels[0]} channel(s) and gives {channels[1]}; frames have 3",
            "Load a model for RGB images",
        )


def _room_for_model(device, sides, pixel_bytes, free):
    """The largest tile the free memory holds, and as many frames of it as fit."""
    fitting = [tile for tile in TILES if tile * tile * pixel_bytes <= free]
    tile = fitting[0] if fitting else TILES[-1]
    return Room(_batch(device, min(tile, sides[0]) * min(tile, sides[1]) * pixel_bytes, free), tile)


def _batch(device, frame_bytes, free):
    """Frames at once: all the free memory holds, up to 16. One on the CPU, where more are no faster."""
    if device.type == "cpu":
        return 1
    return int(max(1, min(MAX_BATCH, free // frame_bytes)))


def _map_frames(images, size, run, room, device):
    """Fill a new [F, *size, 3] batch by batch; what is done stays when memory runs out.

    Args:
        run: (B, 3, H, W) float32 on `device` -> (B, 3, >= height, >= width).
        room: asked anew for each batch, and made smaller when one does not fit.
    """
    if images.device.type == "cpu":
        need_host_bytes(
            len(images) * size[0] * size[1] * 3 * images.element_size(),
            f"{len(images)} frames of {size[1]}x{size[0]}",
            "Choose a smaller scale, or save the video and enlarge it in parts",
        )
    result = torch.empty(len(images), *size, 3, dtype=images.dtype, device=images.device)
    progress, done = Progress(), 0

    def fits(batch):
        try:
            y = run(batch.to(device, torch.float32).permute(0, 3, 1, 2).contiguous())
            result[done : done + len(batch)] = y[:, :, : size[0], : size[1]].permute(0, 2, 3, 1)
        except Exception as error:
            raise_unless_out_of_memory(error)
            return False
        return True

    while done < len(images):
        batch = images[done : done + room.batch]
        if fits(batch):
            done += len(batch)
            progress(done, len(images))
        else:  # the exception and the tensors its traceback held are gone here
            _make_room(room)
    return result


def _make_room(room):
    if not room.shrink():
        raise Refusal(
            f"out of memory with one frame{f' in tiles of {room.tile}' if room.tile else ''}",
            "Choose a smaller model or lanczos1.5, or start ComfyUI with --lowvram",
        )
    memory.soft_empty_cache()


@contextmanager
def cancel_inside(module):
    """Stop on cancel at the next layer of a model whose layers do not look for it themselves."""
    hooks = [part.register_forward_pre_hook(lambda *_: check_cancelled()) for part in module.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fill_spans_with_model(model, images, spans, multiplier, result, progress):
    """Write the frames inside spans of motion with the host's RIFE or FILM.

    Args:
        model: INTERP_MODEL of the host's FrameInterpolationModelLoader.
        images, spans, multiplier, result, progress: as in `minterpolate.fill_spans`.
    """
    height, width = images.shape[1:3]
    network, device, dtype = model.model, model.load_device, model.model_dtype()
    padding = (0, -width % INTERPOLATION_ALIGN, 0, -height % INTERPOLATION_ALIGN)
    shape = (1, height + padding[3], width + padding[1], 3)
    memory.load_models_gpu([model], memory_required=network.memory_used_forward(shape, dtype))
    total, done = sum(len(span.times(multiplier)) for span in spans), 0
    last = (None, None, None)  # index, planes and features of the frame the next span may start with

    def prepared(index):
        if index == last[0]:
            return last
        planes = images[index : index + 1].movedim(-1, 1).to(device, dtype)
        planes = F.pad(planes, padding, mode="replicate")
        return index, planes, network.extract_features(planes)

    with cancel_inside(network), _naming_the_fix():
        for span in spans:
            first, last = prepared(span.first), prepared(span.last)
            cache = {"img0": first[2], "img1": last[2]}
            middles = _middles(network, first[1], last[1], span.times(multiplier), cache)
            for k, middle in enumerate(middles, span.first * multiplier + 1):
                result[k] = middle[:, :height, :width].movedim(0, -1).clamp(0, 1)
                done += 1
                progress(done, total)


def _middles(network, first, last, times, cache):
    """Yield the frames (3, H, W) between two (1, 3, H, W)."""
    if hasattr(network, "forward_multi_timestep"):  # FILM: one motion field serves all times
        yield from network.forward_multi_timestep(first, last, times, cache=cache)
        return
    for t in times:
        time = torch.full_like(first[:, :1], t)
        yield network(first, last, timestep=time, cache=cache)[0]


@contextmanager
def _naming_the_fix():
    try:
        yield
    except Exception as error:
        raise_unless_out_of_memory(error)
        raise Refusal(
            "out of memory between two frames",
            "Put this node before the spatial upsampling, or disconnect interpolation_model to interpolate "
            "on the CPU",
        ) from error
