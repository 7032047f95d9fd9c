"""The host's upscale models (spandrel) and frame interpolation models (RIFE, FILM), on its device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import comfy.model_management as memory
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..frames.lanczos import even_side, lanczos, upscale_tiled
from ..frames.spans import Span
from ..wan.refusal import Refusal
from .memory import need_host_bytes, raise_unless_out_of_memory
from .progress import Progress, check_cancelled

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

    def shrink(self) -> bool:
        """Halves the batch, or else takes the next smaller tile; whether that was possible."""
        smaller = [tile for tile in TILES if tile < self.tile]
        if self.batch > 1:
            self.batch //= 2
        elif smaller:
            self.tile = smaller[0]
        else:
            return False
        return True


def upscale_lanczos(images: Tensor, scale: float) -> Tensor:
    """Frames [F, H, W, 3] resized on the device, to the even sides that are nearest to `side * scale`.

    Raises:
        Refusal: the result does not fit into host memory, or one frame not into that of the device.
    """
    device = memory.get_torch_device()
    height, width = (even_side(side, scale) for side in images.shape[1:3])
    frame_bytes = 4 * 3 * 4 * height * width  # float32: source, first pass, second pass, one matrix product
    memory.free_memory(2 * frame_bytes, device)
    free: Any = memory.get_free_memory(device)  # one number, where no further ones are asked for
    room = Room(_batch(device, frame_bytes, free))
    return _map_frames(images, (height, width), lambda x: lanczos(x, height, width), room, device)


def upscale_with_model(model: Any, images: Tensor) -> Tensor:
    """Frames [F, H, W, 3] enlarged by an UPSCALE_MODEL, without a last row or column that makes a side odd.

    Raises:
        Refusal: as in `upscale_lanczos`.
    """
    device = model.patcher.load_device
    pixel_bytes = MODEL_BYTES * max(model.scale, 1)
    memory.load_models_gpu([model.patcher], memory_required=512 * 512 * pixel_bytes)
    sides = images.shape[1:3]
    room = _room_for_model(device, sides, pixel_bytes, model.patcher.get_free_memory(device))

    def upscale(x: Tensor) -> Tensor:
        return upscale_tiled(model, x, model.scale, room.tile, TILE_OVERLAP, check_cancelled)

    height, width = (side * model.scale // 2 * 2 for side in sides)
    with cancel_inside(model.model):
        return _map_frames(images, (height, width), upscale, room, device)


def no_upscale_model() -> Refusal:
    """The refusal of the method `model` without one."""
    return Refusal(
        "method is model and upscale_model is not connected",
        "Connect Load Upscale Model, or choose lanczos2",
    )


def check_upscale_model(model: Any) -> None:
    """Refuses what is no RGB upscaler of the host's UpscaleModelLoader.

    Raises:
        Refusal: there is none, it is something else, or for another number of channels.
    """
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


def _room_for_model(device: torch.device, sides: Sequence[int], pixel_bytes: int, free: float) -> Room:
    """The largest tile that the free memory holds, and as many frames of it as fit.

    Args:
        sides: height and width of a frame, in pixels.
        pixel_bytes: that the model takes for each pixel of its input.
        free: bytes.
    """
    fitting = [tile for tile in TILES if tile * tile * pixel_bytes <= free]
    tile = fitting[0] if fitting else TILES[-1]
    return Room(_batch(device, min(tile, sides[0]) * min(tile, sides[1]) * pixel_bytes, free), tile)


def _batch(device: torch.device, frame_bytes: int, free: float) -> int:
    """Frames at once: all that the free bytes hold, up to 16. One on the CPU, where more are no faster."""
    if device.type == "cpu":
        return 1
    return int(max(1, min(MAX_BATCH, free // frame_bytes)))


def _map_frames(
    images: Tensor, size: tuple[int, int], run: Callable[[Tensor], Tensor], room: Room, device: torch.device
) -> Tensor:
    """Frames [F, H, W, 3] through a function, batch by batch; those done are kept when memory runs out.

    Args:
        size: height and width of the result.
        run: [B, 3, H, W] float32 on `device` -> [B, 3, >= height, >= width].
        room: read before each batch, and made smaller when one does not fit.
    """
    if images.device.type == "cpu":
        need_host_bytes(
            len(images) * size[0] * size[1] * 3 * images.element_size(),
            f"{len(images)} frames of {size[1]}x{size[0]}",
            "Choose a smaller scale, or save the video and enlarge it in parts",
        )
    result = torch.empty(len(images), *size, 3, dtype=images.dtype, device=images.device)
    progress, done = Progress(), 0

    def fits(batch: Tensor) -> bool:
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
        else:  # outside `except`: its traceback would keep the tensors of the failed batch
            _make_room(room)
    return result


def _make_room(room: Room) -> None:
    if not room.shrink():
        raise Refusal(
            f"out of memory with one frame{f' in tiles of {room.tile}' if room.tile else ''}",
            "Choose a smaller model or lanczos1.5, or start ComfyUI with --lowvram",
        )
    memory.soft_empty_cache()


@contextmanager
def cancel_inside(module: nn.Module) -> Iterator[None]:
    """Inside, a cancelled job stops at the next layer of a model that does not look for it itself."""
    hooks = [part.register_forward_pre_hook(lambda *_: check_cancelled()) for part in module.modules()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Prepared(NamedTuple):
    """A frame as the network reads it.

    Attributes:
        index: in the clip.
        planes: [1, 3, H, W], padded.
        features: the network's own of it.
    """

    index: int
    planes: Tensor
    features: Any


def fill_spans_with_model(
    model: Any,
    images: Tensor,
    spans: list[Span],
    multiplier: int,
    result: Tensor,
    progress: Callable[[int, int], None],
) -> None:
    """Writes the frames inside spans of motion with the host's RIFE or FILM.

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

    def prepared(index: int) -> _Prepared:
        planes = images[index : index + 1].movedim(-1, 1).to(device, dtype)
        planes = F.pad(planes, padding, mode="replicate")
        return _Prepared(index, planes, network.extract_features(planes))

    with cancel_inside(network), _naming_the_fix():
        last = None
        for span in spans:
            # A span mostly starts with the frame at which the one before it ended.
            first = last if last is not None and last.index == span.first else prepared(span.first)
            last = prepared(span.last)
            cache = {"img0": first.features, "img1": last.features}
            middles = _middles(network, first.planes, last.planes, span.times(multiplier), cache)
            for k, middle in enumerate(middles, span.first * multiplier + 1):
                result[k] = middle[:, :height, :width].movedim(0, -1).clamp(0, 1)
                done += 1
                progress(done, total)


def _middles(network: Any, first: Tensor, last: Tensor, times: list[float], cache: dict) -> Iterator[Tensor]:
    """The frames [3, H, W] at times in (0, 1) between two [1, 3, H, W]."""
    if hasattr(network, "forward_multi_timestep"):  # FILM: one motion field serves all times
        yield from network.forward_multi_timestep(first, last, times, cache=cache)
        return
    for t in times:
        time = torch.full_like(first[:, :1], t)
        yield network(first, last, timestep=time, cache=cache)[0]


@contextmanager
def _naming_the_fix() -> Iterator[None]:
    """Inside, a lack of memory becomes a refusal that says what to do."""
    try:
        yield
    except Exception as error:
        raise_unless_out_of_memory(error)
        raise Refusal(
            "out of memory between two frames",
            "Put this node before the spatial upsampling, or disconnect interpolation_model to interpolate "
            "on the CPU",
        ) from error
