"""From image(s) to what a Wan2.1 image-to-video model is given: pixel video, mask, sizes.

F pixel frames (4n+1), T latent frames (n+1), H W pixels, h w latent size (H/8, W/8). Pixels are
[..., H, W, 3] in [0, 1]; mid-grey 0.5 is the release's 0 in [-1, 1].
Source: Wan2.1 `wan/image2video.py` and `wan/first_last_frame2video.py`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import MASK_CHANNELS, VAE_STRIDE
from .refusal import Refusal

RESIZE_MODES = ("crop", "stretch", "pad", "keep_aspect")


def latent_frames(num_frames: int) -> int:
    """Pixel frames F = 4n+1 -> latent frames n+1."""
    return (num_frames - 1) // VAE_STRIDE[0] + 1


def pixel_frames(num_latents: int) -> int:
    """Latent frames n+1 -> pixel frames 4n+1."""
    return (num_latents - 1) * VAE_STRIDE[0] + 1


def keep_aspect_size(image_width: int, image_height: int, width: int, height: int) -> tuple[int, int]:
    """Sides of an image's aspect ratio in an area, each rounded to a multiple of 16.

    Args:
        image_width, image_height: of the image.
        width, height: of the area.

    Returns:
        (width, height), in pixels.
    """
    scale = math.sqrt(width * height / (image_width * image_height))
    width, height = (max(16, round(side * scale / 16) * 16) for side in (image_width, image_height))
    return width, height


def fit_image(image: Tensor, width: int, height: int, mode: str) -> Tensor:
    """Images brought to one size.

    Args:
        image: [B, H, W, 3] in [0, 1].
        width, height: of the size, in pixels.
        mode: crop (fill, cut the middle out), pad (fit, mid-grey around) or stretch; `keep_aspect` has
            chosen the size before and stretches by the rounding.

    Returns:
        [B, height, width, 3]. An image that already has the size is returned as it is; others go
        through antialiased bicubic interpolation.

    Raises:
        Refusal: there is no such mode.
    """
    if mode not in RESIZE_MODES:
        modes = ", ".join(RESIZE_MODES)
        raise Refusal(f"resize_mode is {mode!r}; it is one of {modes}", "Choose one of these")
    old_height, old_width = image.shape[1:3]
    if (old_height, old_width) == (height, width):
        return image
    if mode == "crop":
        scale = min(old_width / width, old_height / height)
        image = _middle(image, max(1, round(width * scale)), max(1, round(height * scale)))
        return _resize(image, width, height)
    if mode == "pad":
        scale = min(width / old_width, height / old_height)
        inner = _resize(image, max(1, round(old_width * scale)), max(1, round(old_height * scale)))
        canvas = image.new_full((image.shape[0], height, width, image.shape[3]), 0.5)
        top, left = (height - inner.shape[1]) // 2, (width - inner.shape[2]) // 2
        canvas[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
        return canvas
    return _resize(image, width, height)


def _middle(image: Tensor, width: int, height: int) -> Tensor:
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    return image[:, top : top + height, left : left + width]


def _resize(image: Tensor, width: int, height: int) -> Tensor:
    pixels = image.movedim(-1, 1).float()
    pixels = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return pixels.clamp(0, 1).movedim(1, -1)


def pixel_video(start: Tensor, num_frames: int, end: Tensor | None = None) -> Tensor:
    """Start frames, mid-grey, and the end image as last frame when given.

    Args:
        start: [S, H, W, 3] in [0, 1], S <= F.
        num_frames: F, of the video.
        end: [H, W, 3] in [0, 1].

    Returns:
        [F, H, W, 3] in [0, 1].
    """
    video = start.new_full((num_frames, *start.shape[1:]), 0.5)
    video[: len(start)] = start
    if end is not None:
        video[-1] = end
    return video


def known_mask(
    num_frames: int,
    height: int,
    width: int,
    end: bool = False,
    end_alone: bool = False,
    start_frames: int = 1,
) -> Tensor:
    """Which frames the model is told to keep: 1 = known.

    Each pixel frame has one bit; the first counts four times, and four bits make a latent frame. With
    `end` the last pixel frame is known too: in its place as frame F (last latent 0, 0, 0, 1), or with
    `end_alone` as a latent of its own behind the others (1, 1, 1, 1).

    Args:
        num_frames: F, without an end image that is a latent of its own.
        height, width: in pixels.
        end: whether there is an end image.
        end_alone: whether it is a latent of its own.
        start_frames: pixel frames known at the start, 4n+1.

    Returns:
        [1, 4, T, H/8, W/8], T = n+1, or n+2 with `end_alone`.
    """
    known = torch.zeros(latent_frames(num_frames) + end_alone, MASK_CHANNELS)
    known[: latent_frames(start_frames)] = 1
    if end_alone:
        known[-1] = 1
    elif end:
        known[-1, -1] = 1
    known = known.T.reshape(1, MASK_CHANNELS, -1, 1, 1)
    return known.expand(-1, -1, -1, height // VAE_STRIDE[1], width // VAE_STRIDE[2]).contiguous()
