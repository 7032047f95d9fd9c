"""The only package that touches ComfyUI's internals, as read in ComfyUI 0.30.0.

It puts our model, VAE and text encoder into the host's standard MODEL, VAE and CLIP, and lends our
sampler the host's life cycle: device memory, model patches, progress, preview and cancel.
"""

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE

from .attention import attention_to_get, choose_attention_for, retry_of, unused_override
from .coefficients import measured_coefficients
from .conditioning import (
    Conditioning,
    describe_conditioning,
    missing_clip_vision,
    not_finite,
    trim_clip_vision,
)
from .decode import shared_vae, vae_recipe_of
from .devices import devices_of, gpu_count, spread
from .fp16_sums import OVERFLOWED
from .guide import GUIDE, has_guide, with_guide
from .kernels import kernels_of
from .latent_file import KeptLatent
from .load import DTYPES, WEIGHT_DTYPES, load_model, notes_on_file
from .lora import add_lora, other_family, packed_by_another_pack, read_lora
from .memory import MemoryWatch, frame_device, need_host_bytes, plan_memory
from .model import checkpoint_name, config_of, is_ours
from .patches import changed_in_host, ignored_patches, refused_patch
from .progress import Progress, StepProgress, check_cancelled, speaking_as, tell
from .remote import (
    WITHOUT_WEIGHTS,
    blocked,
    is_remote,
    process_settings,
    recipe_of,
    remote_model,
    workers_report,
)
from .sampling import Prepared, as_video_latent, fresh_noise, run_sampling, sigma_below_one
from .stored import spoilt_weight
from .text_encoder import load_text_encoder
from .upsample import (
    check_upscale_model,
    fill_spans_with_model,
    no_upscale_model,
    upscale_lanczos,
    upscale_with_model,
)
from .vae import decode_video, encode_video, latent_device, load_vae, vae_shape, why_nan

__all__ = [
    "DTYPES",
    "GUIDE",
    "OVERFLOWED",
    "VAE",
    "WEIGHT_DTYPES",
    "WITHOUT_WEIGHTS",
    "Conditioning",
    "KeptLatent",
    "MemoryWatch",
    "ModelPatcher",
    "Prepared",
    "Progress",
    "StepProgress",
    "add_lora",
    "as_video_latent",
    "attention_to_get",
    "blocked",
    "changed_in_host",
    "check_cancelled",
    "check_upscale_model",
    "checkpoint_name",
    "choose_attention_for",
    "config_of",
    "decode_video",
    "describe_conditioning",
    "devices_of",
    "encode_video",
    "fill_spans_with_model",
    "frame_device",
    "fresh_noise",
    "gpu_count",
    "has_guide",
    "ignored_patches",
    "is_ours",
    "is_remote",
    "kernels_of",
    "latent_device",
    "load_model",
    "load_text_encoder",
    "load_vae",
    "measured_coefficients",
    "missing_clip_vision",
    "need_host_bytes",
    "no_upscale_model",
    "not_finite",
    "notes_on_file",
    "other_family",
    "packed_by_another_pack",
    "plan_memory",
    "process_settings",
    "read_lora",
    "recipe_of",
    "refused_patch",
    "remote_model",
    "retry_of",
    "run_sampling",
    "shared_vae",
    "sigma_below_one",
    "speaking_as",
    "spoilt_weight",
    "spread",
    "tell",
    "trim_clip_vision",
    "unused_override",
    "upscale_lanczos",
    "upscale_with_model",
    "vae_recipe_of",
    "vae_shape",
    "why_nan",
    "with_guide",
    "workers_report",
]
