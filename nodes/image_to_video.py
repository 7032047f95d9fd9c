"""Images into the conditioning of an image-to-video model, and the empty latent to fill."""

from typing import Any

import node_helpers
import torch
from comfy_api.latest import io
from torch import Tensor

from .. import host
from ..wan.conditioning import (
    RESIZE_MODES,
    fit_image,
    keep_aspect_size,
    known_mask,
    latent_frames,
    pixel_frames,
    pixel_video,
)
from ..wan.config import LATENT_CHANNELS, VAE_STRIDE
from ..wan.refusal import Refusal
from . import checks
from .kept_latent import END_LATENT_ALONE
from .load import CATEGORY
from .named import named

NODE = "Wan21ImageToVideo"
MAX_SIDE = 8192
MAX_FRAMES = 4097
VIDEO_COPIES = 2.5  # peak host memory of the encode, in copies of the video's float32 pixels


class Wan21ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id=NODE,
            display_name="Wan2.1 Image to Video",
            category=CATEGORY,
            description="Encode the start image, and an end image if wanted, for Wan21Sampler.",
            search_aliases=[
                "wan i2v",
                "img2vid",
                "animate",
                "start image",
                "first last frame",
                "flf2v",
                "end image",
            ],
            inputs=[
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Vae.Input("vae"),
                io.Image.Input(
                    "start_image",
                    tooltip="The first frame; or the last 5, 9, 13 ... frames of a clip to go on from, which "
                    "the video then begins with.",
                ),
                io.Int.Input("width", default=832, min=16, max=MAX_SIDE, step=8),
                io.Int.Input("height", default=480, min=16, max=MAX_SIDE, step=8),
                io.Int.Input(
                    "num_frames",
                    default=81,
                    min=1,
                    max=MAX_FRAMES,
                    step=4,
                    tooltip="4n+1 frames; Wan2.1 plays 16 a second, and was trained on 81.",
                ),
                io.Combo.Input(
                    "resize_mode",
                    options=list(RESIZE_MODES),
                    default="crop",
                    tooltip="crop fills the frame and cuts the rest; pad shows all with grey borders; "
                    "stretch distorts; keep_aspect takes width x height as an area to fill.",
                ),
                io.Boolean.Input(
                    "add_frames_for_end_image",
                    default=False,
                    tooltip="End image only. Off: it is the last frame (for first-last-frame and Fun-InP "
                    "models). On: it is a latent of its own behind the video, for plain i2v models.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "tile_size",
                    options=["auto", "0", "128", "256"],
                    default="auto",
                    tooltip="Pixels of a tile for the VAE encode; 0 and auto encode whole frames, and go on "
                    "in tiles of 256 when memory runs out.",
                    advanced=True,
                ),
                io.Image.Input("end_image", optional=True),
                io.ClipVisionOutput.Input("clip_vision_start", optional=True),
                io.ClipVisionOutput.Input("clip_vision_end", optional=True),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"),
                io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="latent"),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, width: int | None = None, height: int | None = None, num_frames: int | None = None
    ) -> bool:
        """Refuses impossible sizes when the prompt is queued (a linked input arrives as None).

        What is no number is refused by the host, and arrives here all the same.
        """
        check_sizes(*(value if isinstance(value, int) else None for value in (width, height, num_frames)))
        return True

    @classmethod
    @named(NODE)
    def execute(
        cls,
        positive: list,
        negative: list,
        vae: host.VAE,
        start_image: Tensor,
        width: int,
        height: int,
        num_frames: int,
        resize_mode: str,
        add_frames_for_end_image: bool,
        tile_size: str,
        end_image: Tensor | None = None,
        clip_vision_start: Any = None,
        clip_vision_end: Any = None,
    ) -> io.NodeOutput:
        check_sizes(width, height, num_frames)
        check_inputs(vae, start_image, end_image, clip_vision_start, clip_vision_end, num_frames)
        start_image = known_frames(start_image)
        if resize_mode == "keep_aspect":
            width, height = keep_aspect_size(start_image.shape[2], start_image.shape[1], width, height)
        host.need_host_bytes(
            VIDEO_COPIES * 12 * width * height * num_frames,
            f"{num_frames} frames of {width}x{height}",
            "Set fewer frames or a smaller size",
        )
        for name, image in (("start_image", start_image), ("end_image", end_image)):
            if image is not None and image.shape[-1] > 3:
                host.tell(f"{name} has transparency, which is left out")
        start = fit_image(in_colour(start_image), width, height, resize_mode)
        end = None if end_image is None else fit_image(in_colour(end_image), width, height, resize_mode)[0]
        alone = end is not None and add_frames_for_end_image
        video = pixel_video(start, num_frames, None if alone else end)
        image_latent = host.encode_video(vae, video, tile_size)
        if end is not None and alone:
            image_latent = torch.cat([image_latent, host.encode_video(vae, end[None], tile_size)], dim=2)
        mask = known_mask(num_frames, height, width, end is not None, alone, len(start))
        values: dict[str, Any] = {
            "concat_latent_image": image_latent,
            "concat_mask": 1 - mask,
        }  # the host's 0 is known
        clip = join_clip_vision(clip_vision_start, clip_vision_end)
        if clip is not None:
            values["clip_vision_output"] = clip
        latent: dict[str, Any] = {"samples": empty_latent(num_frames, height, width, alone)}
        if alone:
            latent[END_LATENT_ALONE] = latent["samples"].shape[2]
            values[host.GUIDE] = True
            host.tell(
                f"the end image is latent frame {latent['samples'].shape[2]}, behind the video: a MODEL of "
                "Wan21ModelLoader leaves it out of the result; with another loader's MODEL decode with "
                "Wan21VAEDecode, which drops it too"
            )
        return io.NodeOutput(
            node_helpers.conditioning_set_values(positive, values),
            node_helpers.conditioning_set_values(negative, values),
            latent,
        )


def check_sizes(width: int | None, height: int | None, num_frames: int | None) -> None:
    """Whether there can be a video of this size; None where a value is not known yet."""
    for name, value, limit in (
        ("width", width, MAX_SIDE),
        ("height", height, MAX_SIDE),
        ("num_frames", num_frames, MAX_FRAMES),
    ):
        if value is not None and value > limit:
            raise Refusal(f"{name} is {value}; the most is {limit}", f"Set {limit} or less")
    checks.check_sides(16 if width is None else width, 16 if height is None else height)
    checks.check_num_frames(1 if num_frames is None else num_frames)


def check_inputs(
    vae: host.VAE,
    start_image: Tensor,
    end_image: Tensor | None,
    clip_start: Any,
    clip_end: Any,
    num_frames: int,
) -> None:
    """Whether the inputs go together.

    Args:
        vae: VAE.
        start_image: IMAGE of one or more frames.
        end_image: IMAGE of one, or None.
        clip_start, clip_end: CLIP_VISION_OUTPUT of the images, or None.
        num_frames: of the video.
    """
    checks.check_vae(*host.vae_shape(vae))
    checks.check_image("start_image", start_image, several=True)
    known = pixel_frames(latent_frames(len(start_image)))
    if known > 1 and known >= num_frames:
        raise Refusal(
            f"start_image holds {len(start_image)} frames and num_frames is {num_frames}; the known frames "
            "are fewer than those of the video",
            f"Set num_frames to {known + 4} or more, or take the clip's last frames with ImageFromBatch",
        )
    if end_image is not None:
        checks.check_image("end_image", end_image)
        if num_frames < 5:
            raise Refusal(
                f"num_frames is {num_frames} with an end image; it must be at least 5", "Set 5 or more"
            )
    if clip_end is not None and clip_start is None:
        raise Refusal(
            "clip_vision_end is connected and clip_vision_start is not; the start image comes first",
            "Connect clip_vision_start too, or neither",
        )
    if clip_end is not None:
        check_clip_pair(clip_start, clip_end)


def check_clip_pair(start: Any, end: Any) -> None:
    """Whether CLIP_VISION_OUTPUTs of the start and the end image can be read as one."""
    (starts, _, width), (ends, _, end_width) = (o.penultimate_hidden_states.shape for o in (start, end))
    if starts != ends:
        raise Refusal(
            f"clip_vision_start holds features of {starts} image(s) and clip_vision_end of {ends}; they go "
            "together one by one",
            "Encode one start image and one end image, each picked with ImageFromBatch",
        )
    if width != end_width:
        raise Refusal(
            f"clip_vision_start is {width} wide and clip_vision_end {end_width}; one model reads both",
            "Encode both images with the same CLIP vision model, CLIP ViT-H/14 (clip_vision_h.safetensors)",
        )


def in_colour(image: Tensor) -> Tensor:
    """[B, H, W, C] as RGB: without transparency, and grey (C 1) in all three channels, as natively."""
    return image[..., :3].expand(*image.shape[:3], 3)


def known_frames(start_image: Tensor) -> Tensor:
    """The last 4n+1 of the start frames [F, H, W, C], those that fill latents; what is left out is said."""
    frames = len(start_image)
    known = pixel_frames(latent_frames(frames))
    if known < frames:
        host.tell(
            f"start_image holds {frames} frames and 4n+1 can be known: the video begins with the last {known}"
        )
    return start_image[-known:]


def empty_latent(num_frames: int, height: int, width: int, end_alone: bool) -> Tensor:
    """The latent to fill, [1, 16, T, height/8, width/8]; one frame more with an end image of its own."""
    frames = latent_frames(num_frames) + end_alone
    return torch.zeros(
        1,
        LATENT_CHANNELS,
        frames,
        height // VAE_STRIDE[1],
        width // VAE_STRIDE[2],
        device=host.latent_device(),
    )


def join_clip_vision(start: Any, end: Any) -> Any:
    """Features of both images, 257 + 257 tokens, as first-last-frame models read them."""
    images = 1 if start is None else len(start.penultimate_hidden_states)
    if images > 1:  # as often when a whole clip was encoded
        host.tell(f"the CLIP vision features are of {images} images: a single video reads those of the first")
    if start is None or end is None:
        return start
    joined = type(start)()
    joined.penultimate_hidden_states = torch.cat(
        [start.penultimate_hidden_states, end.penultimate_hidden_states], dim=-2
    )
    return joined
