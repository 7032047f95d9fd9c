"""More pixels and more frames for a finished clip."""

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .. import host
from ..frames import minterpolate
from ..frames.spans import SCENE_CUT, Span, frame_changes, plan_spans
from ..host.sockets import InterpolationModel
from ..wan.refusal import Refusal
from . import checks
from .load import CATEGORY
from .named import named

SPACE = "Wan21SpatialUpsample"
TIME = "Wan21TemporalUpsample"
LANCZOS = {"lanczos1.5": 1.5, "lanczos2": 2}
METHODS = ("none", *LANCZOS, "model")
MULTIPLIERS = {"x2": 2, "x4": 4}
log = logging.getLogger(__name__)


class Wan21SpatialUpsample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=SPACE,
            display_name="Wan2.1 Spatial Upsample",
            category=CATEGORY,
            description="Give every frame more pixels, a few frames at a time.",
            search_aliases=["upscale video", "lanczos", "esrgan", "super resolution", "resize"],
            inputs=[
                io.Image.Input("images"),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    default="lanczos1.5",
                    tooltip="lanczos enlarges sharply and invents nothing; model runs upscale_model; none "
                    "passes the frames on. Sides come out even, as video encoders want them.",
                ),
                io.UpscaleModel.Input(
                    "upscale_model",
                    optional=True,
                    tooltip="From Load Upscale Model; used by the method model only.",
                ),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None, upscale_model: Any = "absent") -> bool:
        """Refuses a missing model when the graph is queued, not after hours of sampling.

        A linked input arrives as None, an unconnected one not at all. Having `method` as an argument turns
        the host's own check of it off.
        """
        if method is not None and method not in METHODS:
            raise Refusal(f"method is {method!r}; it is one of {', '.join(METHODS)}", "Choose one of them")
        if method == "model" and upscale_model == "absent":
            raise host.no_upscale_model()
        return True

    @classmethod
    @named(SPACE)
    def execute(cls, images: Tensor, method: str, upscale_model: Any = None) -> io.NodeOutput:
        checks.check_frames(images)
        if method == "none":
            return io.NodeOutput(images)
        started = time.perf_counter()
        if method == "model":
            host.check_upscale_model(upscale_model)
            result = host.upscale_with_model(upscale_model, images)
        else:
            result = host.upscale_lanczos(images, LANCZOS[method])
        log.info(
            "%s: %d frames %s -> %s, %s, %.1f s", SPACE, len(images), _size(images), _size(result), method,
            time.perf_counter() - started,
        )  # fmt: skip
        return io.NodeOutput(result)


class Wan21TemporalUpsample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=TIME,
            display_name="Wan2.1 Temporal Upsample",
            category=CATEGORY,
            description="Put new frames between those of a clip; it plays as long as before, more smoothly.",
            search_aliases=["frame interpolation", "rife", "film", "minterpolate", "fps", "smooth motion"],
            inputs=[
                io.Image.Input("images"),
                io.Float.Input(
                    "fps",
                    default=16.0,
                    min=0.01,
                    max=1000.0,
                    step=0.01,
                    tooltip="Frames a second of the images; Wan2.1 makes 16.",
                ),
                io.Combo.Input(
                    "method",
                    options=list(MULTIPLIERS),
                    default="x2",
                    tooltip="x2 puts one new frame between two, x4 three.",
                ),
                InterpolationModel.Input(
                    "interpolation_model",
                    optional=True,
                    tooltip="RIFE or FILM from Load Frame Interpolation Model. Without it FFmpeg follows the "
                    "motion of blocks; that needs no weights.",
                ),
                io.Float.Input(
                    "scene_cut_threshold",
                    default=SCENE_CUT,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Change of content (1 - SSIM at 32x32) above which two frames are a cut: the "
                    "nearer one is repeated, nothing morphs. Lower finds more cuts; 1 finds none.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output(), io.Float.Output(display_name="fps")],
        )

    @classmethod
    @named(TIME)
    def execute(
        cls,
        images: Tensor,
        fps: float,
        method: str,
        interpolation_model: host.ModelPatcher | None = None,
        scene_cut_threshold: float = SCENE_CUT,
    ) -> io.NodeOutput:
        checks.check_frames(images, least=2)
        checks.check_fps(fps)
        if interpolation_model is None and not minterpolate.available():
            raise Refusal(
                "the FFmpeg in PyAV (package av) has no filter minterpolate",
                "Reinstall av from PyPI, or connect Load Frame Interpolation Model",
            )
        started, multiplier = time.perf_counter(), MULTIPLIERS[method]
        spans = plan_spans(*frame_changes(images, lambda i: host.check_cancelled()), scene_cut_threshold)
        result = _with_cuts(images, spans, multiplier)
        motion = [span for span in spans if not span.cut]
        if interpolation_model is None:
            minterpolate.fill_spans(images, motion, multiplier, result, host.Progress())
        else:
            host.fill_spans_with_model(
                interpolation_model, images, motion, multiplier, result, host.Progress()
            )
        log.info(
            "%s: %d frames at %g fps -> %d at %g with %s; %d cut(s) kept, %d duplicate(s) bridged, %.1f s",
            TIME, len(images), fps, len(result), fps * multiplier,
            "minterpolate" if interpolation_model is None else type(interpolation_model.model).__name__,
            len(spans) - len(motion), sum(span.last - span.first - 1 for span in motion),
            time.perf_counter() - started,
        )  # fmt: skip
        return io.NodeOutput(result, fps * multiplier)


def _with_cuts(images: Tensor, spans: Sequence[Span], multiplier: int) -> Tensor:
    """The whole result with the given frames and, at cuts, the nearer of the two; the rest is not set."""
    count = (len(images) - 1) * multiplier + 1
    if images.device.type == "cpu":
        host.need_host_bytes(
            count * images[0].nbytes,
            f"{count} frames of {_size(images)}",
            "Choose x2, put this node before the spatial upsampling, or save the video and do it in parts",
        )
    result = torch.empty(count, *images.shape[1:], dtype=images.dtype, device=images.device)
    result[::multiplier] = images
    for span in spans:
        if span.cut:
            for k, t in enumerate(span.times(multiplier), span.first * multiplier + 1):
                result[k] = images[span.first if t <= 0.5 else span.last]
    return result


def _size(images: Tensor) -> str:
    return f"{images.shape[2]}x{images.shape[1]}"
