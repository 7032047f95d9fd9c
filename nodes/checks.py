"""What is wrong with a job, said before any heavy work: the value, the rule, the fix.

Every function raises a `Refusal` for the person at the graph, or returns.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import host
from ..wan.conditioning import pixel_frames
from ..wan.config import CLIP_TOKENS, LATENT_CHANNELS, VAE_STRIDE, WanConfig
from ..wan.refusal import Refusal

_KNOWN_LATENTS = {4: "Stable Diffusion", 48: "Wan2.2-5B", 128: "LTX-Video or Flux2"}

BROKEN_LATENT = (
    "The usual causes are fp16 overflow (load the model as bf16) and a quantised attention kernel (start the "
    "host without --use-sage-attention)"
)


def check_model(model: host.ModelPatcher) -> None:
    """Whether a MODEL can be sampled by our sampler."""
    if not host.is_ours(model):
        raise Refusal(
            "the MODEL was not loaded by Wan21ModelLoader",
            "Load it with Wan21ModelLoader, or sample it with the host's KSampler",
        )
    if refusal := host.refused_patch(model):
        raise refusal


def check_second_model(model: host.ModelPatcher, second: host.ModelPatcher) -> None:
    """Whether a second MODEL can carry on what the first began."""
    if not host.is_ours(second):
        raise Refusal(
            "model_low_noise was not loaded by Wan21ModelLoader",
            "Load it with Wan21ModelLoader, or run both with the host's KSamplerAdvanced",
        )
    if refusal := host.refused_patch(second):
        raise refusal.about("model_low_noise")
    kinds = [host.config_of(one).kind for one in (model, second)]
    if host.config_of(model).takes_image != host.config_of(second).takes_image:
        raise Refusal(
            f"model is {kinds[0]} and model_low_noise {kinds[1]}: they are not experts of one model",
            "Load the high- and the low-noise file of one release",
        )


def check_num_frames(num_frames: int) -> None:
    """Whether a video may have so many frames."""
    if num_frames < 1 or num_frames % VAE_STRIDE[0] != 1:
        lower = max(1, (num_frames - 1) // 4 * 4 + 1)
        raise Refusal(
            f"num_frames is {num_frames}; Wan2.1 makes 4n+1 frames",
            f"Set {lower} or {lower + 4}",
        )


def check_sides(width: int, height: int) -> None:
    """Whether a video may be of this size, in pixels; the model fills a side that is no multiple of 16 up."""
    for name, value in (("width", width), ("height", height)):
        if value < 16 or value % 8:
            lower = max(16, value // 8 * 8)
            raise Refusal(
                f"{name} is {value}; sides are multiples of 8 pixels from 16 on",
                f"Set {lower} or {lower + 8}",
            )


def check_image(name: str, image: Tensor, several: bool = False) -> None:
    """Whether an IMAGE holds one picture.

    Args:
        name: of the input.
        image: [B, H, W, C] as the host hands it.
        several: whether more than one may do.
    """
    shape = tuple(image.shape)
    if len(shape) != 4 or 0 in shape:
        raise Refusal(
            f"{name} has the shape {list(shape)}; it must hold an image [1, H, W, 3]",
            "Connect an image",
        )
    if shape[0] != 1 and not several:
        raise Refusal(
            f"{name} holds {shape[0]} images; it must be one",
            "Pick one with ImageFromBatch, or use the host's WanFirstLastFrameToVideo, which takes several",
        )
    if shape[3] == 2:
        raise Refusal(f"{name} has 2 channels; it must be RGB or grey", "Connect a colour image")
    if not torch.isfinite(image).all():
        raise Refusal(
            f"{name} holds NaN or infinite pixels",
            "Look at the node that made it, often a failed decode",
        )


def check_frames(images: Tensor, least: int = 1) -> None:
    """Whether an IMAGE holds a video.

    Args:
        images: [F, H, W, C] as the host hands it.
        least: the fewest frames that make sense.
    """
    check_shape(images)
    if len(images) < least:
        raise Refusal(
            f"images holds {len(images)} frame; there is no time between frames to fill",
            f"Connect at least {least} frames, or leave this node out",
        )
    check_finite_frames(images)


def check_shape(images: Tensor, name: str = "images") -> None:
    """Whether an IMAGE has the shape of a video, [F, H, W, 3]."""
    shape = tuple(images.shape)
    if len(shape) != 4 or 0 in shape:
        raise Refusal(
            f"{name} has the shape {list(shape)}; it must be frames [F, H, W, 3]", "Connect a video"
        )
    if shape[3] != 3:
        raise Refusal(
            f"{name} has {shape[3]} channel(s); frames are RGB, 3 channels",
            "Take the alpha channel off with SplitImageWithAlpha, or connect colour frames",
        )


def check_finite_frames(images: Tensor, name: str = "images") -> None:
    """Whether every pixel of frames [F, H, W, 3] is a number."""
    for i, frame in enumerate(images):  # one at a time: the mask of a whole clip takes a quarter of its bytes
        if not torch.isfinite(frame).all():
            raise Refusal(
                f"frame {i} of {name} holds NaN or infinite pixels",
                "Look at the node that made it, often a failed decode",
            )


def check_fps(fps: float) -> None:
    """Whether a video can play so many frames a second."""
    if not (math.isfinite(fps) and fps > 0):
        raise Refusal(f"fps is {fps:g}; a video has more than 0 frames a second", "Set 16, Wan2.1's rate")


def check_vae(latent_channels: int, latent_dim: int, compression: int) -> None:
    """Whether a VAE of this shape is Wan2.1's: as `host.vae_shape` gives it."""
    if (latent_channels, latent_dim, compression) != (LATENT_CHANNELS, 3, VAE_STRIDE[1]):
        kind = {48: " (Wan2.2's)", 4: " (Stable Diffusion's)"}.get(latent_channels, "")
        raise Refusal(
            f"the VAE has {latent_channels} channels{kind}, {latent_dim} dimensions and compresses "
            f"{compression}x; Wan2.1 needs 16 channels, 3 dimensions, 8x",
            "Load a Wan2.1 VAE with Wan21VAELoader",
        )


def check_latent(samples: Tensor) -> None:
    """Whether a latent is Wan2.1's."""
    if samples.is_nested:
        raise Refusal(
            f"the latent holds {len(samples.unbind())} latents, as of video with sound (LTX-Video)",
            "Connect Wan21ImageToVideo or EmptyHunyuanLatentVideo",
        )
    shape = tuple(samples.shape)
    if len(shape) != 5 or shape[1] != LATENT_CHANNELS:
        channels = shape[1] if len(shape) > 1 else 0
        kind = _KNOWN_LATENTS.get(channels, "another model's")
        owner = "an image latent" if len(shape) == 4 and channels == LATENT_CHANNELS else f"{kind} latent"
        raise Refusal(
            f"the latent has the shape {list(shape)} ({owner}); Wan2.1 works on [batch, 16, frames, h, w]",
            "Connect Wan21ImageToVideo, EmptyHunyuanLatentVideo, or a video encoded with a Wan2.1 VAE",
        )
    if 0 in shape:
        raise Refusal(f"the latent is empty, {list(shape)}", "Connect a latent with frames")
    if not torch.isfinite(samples).all():
        raise Refusal(f"the latent holds NaN or infinite numbers ({_broken(samples)})", BROKEN_LATENT)


def check_conditioning(config: WanConfig, latent_shape: Sequence[int], cond: host.Conditioning) -> None:
    """Whether one conditioning fits the model and the latent [B, 16, T, h, w]."""
    if not cond.entries:
        raise Refusal(f"{cond.name} is empty; this sampler reads one prompt", "Connect a text encode node")
    if cond.entries != 1:
        raise Refusal(
            f"{cond.name} holds {cond.entries} entries; this sampler uses one",
            "Remove ConditioningCombine and the like, or sample with the host's KSampler",
        )
    if cond.unsupported:
        raise Refusal(
            f"{cond.name} carries {', '.join(cond.unsupported)}, which this sampler does not apply",
            "Remove the nodes that set it, or sample with the host's KSampler",
        )
    _check_text(config, cond)
    _check_image_latent(config, latent_shape, cond)
    _check_frames_beside(config, cond)
    _check_clip(config, cond)


def check_finite_conditioning(name: str, conditioning: list) -> None:
    """Whether a CONDITIONING holds numbers; what made those that are none is named."""
    makers = {"text": "text encoder", "image": "VAE", "CLIP vision": "CLIP vision model"}
    for part in host.not_finite(conditioning):
        raise Refusal(
            f"the {part} features in {name} hold NaN or infinite numbers",
            f"The {makers[part]}'s file is damaged, or it was run in fp16 and overflowed: get the file "
            "again, or load it in bf16 or fp32",
        )


def _check_text(config: WanConfig, cond: host.Conditioning) -> None:
    if cond.text is None or cond.text[-1] != config.text_dim:
        width = "no text features" if cond.text is None else f"text features {cond.text[-1]} wide"
        raise Refusal(
            f"{cond.name} has {width}; this model reads {config.text_dim}",
            "Encode the prompt with the umT5 text encoder that belongs to the model (Wan21TextEncoderLoader)",
        )


def _check_image_latent(config: WanConfig, latent_shape: Sequence[int], cond: host.Conditioning) -> None:
    if not config.takes_image and cond.image_latent is not None:
        raise Refusal(
            f"the model is text-to-video (16 channels) and {cond.name} carries an image",
            "Load an i2v model, or connect the prompts to the sampler directly",
        )
    frames = latent_shape[-3]
    for what, shape, channels in (("image", cond.image_latent, LATENT_CHANNELS), ("mask", cond.mask, 1)):
        if shape is None:
            continue
        if len(shape) != 5 or shape[1] % channels:
            raise Refusal(
                f"the {what} in {cond.name} has the shape {list(shape)}; it must be [1, {channels}, frames, "
                "height, width]",
                "Connect Wan21ImageToVideo, or another node that makes it for Wan2.1",
            )
        if shape[-3] == frames:
            continue
        if what == "mask" and shape[-3] < frames:
            continue  # filled up with unknown frames, as the host does
        raise Refusal(
            f"the {what} in {cond.name} is {_size(shape)} and the latent is {_size(latent_shape)}",
            "Take latent and conditioning from the same Wan21ImageToVideo, or give both the same length",
        )


def _check_frames_beside(config: WanConfig, cond: host.Conditioning) -> None:
    if cond.frames_beside and config.takes_image:
        raise Refusal(
            f"{cond.name} carries time_dim_concat (frames of subjects, as of Phantom) and the model is "
            "image-to-video",
            "Load the text-to-video model that belongs to it",
        )


def _check_clip(config: WanConfig, cond: host.Conditioning) -> None:
    if cond.clip is None or config.image_dim is None:
        return
    tokens, width = cond.clip[-2:]
    if width != config.image_dim or tokens % CLIP_TOKENS:
        raise Refusal(
            f"{cond.name} has CLIP vision features of {tokens} tokens x {width}; this model reads "
            f"{CLIP_TOKENS} (one image) or {2 * CLIP_TOKENS} (start and end) x {config.image_dim}",
            "Encode the image with CLIP ViT-H/14 (clip_vision_h.safetensors)",
        )


def notes_on_conditioning(
    config: WanConfig, latent_shape: Sequence[int], cond: host.Conditioning
) -> list[str]:
    """What the model is given otherwise than it may look, all as with the host's own Wan2.1."""
    notes = []
    if config.takes_image and cond.image_latent is None and not config.empty_start:
        notes.append(
            f"the model is image-to-video and {cond.name} carries no image: it is given an empty one. For a "
            "picture put Wan21ImageToVideo between the prompts and the sampler"
        )
    if cond.image_latent is not None and cond.image_latent[-2:] != tuple(latent_shape[-2:]):
        notes.append(
            f"the image in {cond.name} is {_size(cond.image_latent)}: it is resized to the latent, "
            f"{_size(latent_shape)}"
        )
    if missing := host.missing_clip_vision(config, cond.clip):
        notes.append(missing)
    if cond.unread:
        notes.append(
            f"{cond.name} carries {', '.join(cond.unread)}, which this model does not read; the host's "
            "loader gives one that does not either"
        )
    return notes


def _size(shape: Sequence[int]) -> str:
    frames, height, width = shape[-3:]
    return f"{width * 8}x{height * 8}, {pixel_frames(frames)} frames ({frames} latent)"


def check_finite(samples: Tensor) -> None:
    """After sampling: a latent that cannot be decoded is named where it arose."""
    if not torch.isfinite(samples).all():
        raise Refusal(f"sampling gave NaN or infinite numbers ({_broken(samples)})", BROKEN_LATENT)


def _broken(samples: Tensor) -> str:
    share = 100 * (1 - torch.isfinite(samples).sum().item() / math.prod(samples.shape))
    return f"{share:.0f} % of the latent"
