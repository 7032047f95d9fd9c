"""Names what a state dict is, so that a file picked in the wrong loader is called by its name.

A table of key patterns, first match wins; the few cases that only shapes tell apart follow it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from ..refusal import Refusal
from .limits import json_table


class Kind(NamedTuple):
    """What a checkpoint is: an identifier, words for the person, and what to do with the file."""

    name: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.what}; {self.fix}"


class WrongKind(Refusal):
    """A file that is something else than what was to be read.

    Attributes:
        kind: what it is; None where nothing known matches.
    """

    def __init__(self, problem: str, fix: str, kind: Kind | None = None):
        super().__init__(problem, fix)
        self.kind = kind

    def about(self, what: str) -> "WrongKind":
        """The same with the name of a file or a node in front."""
        return WrongKind(f"{what}: {self.problem}", self.fix, self.kind)


_VARIANT = "pick a Wan2.1 text-to-video, image-to-video or first-last-frame model"
_VAE = "pick the Wan2.1 VAE (wan_2.1_vae.safetensors)"
_TEXT = "pick a umT5 text encoder (umt5_xxl_*.safetensors)"

WAN21_DIT = Kind("wan21_dit", "a Wan2.1 diffusion model", "load it as a diffusion model")
WAN21_VAE = Kind("wan21_vae", "the Wan2.1 VAE", "load it as a VAE")
UMT5 = Kind("umt5", "a umT5 text encoder", "load it as a text encoder")
T5 = Kind("t5", "a plain T5 text encoder (relative positions in the first block only)", _TEXT)
LORA = Kind("lora", "a LoRA", "load the base model, and then the LoRA")
WAN22_DIT = Kind("wan22_dit", "a Wan2.2 5B diffusion model (48 latent channels)", _VARIANT)
WAN22_VAE = Kind("wan22_vae", "the Wan2.2 VAE (48 latent channels)", _VAE)
OTHER_VAE = Kind("vae", "a VAE of another model", _VAE)
CLIP_VISION = Kind("clip_vision", "a CLIP vision model", "load it as a CLIP vision model")
FUN_CONTROL = Kind("fun_control", "a Wan2.1 Fun-Control model", _VARIANT)
FUN_CAMERA = Kind("fun_camera", "a Wan2.1 Fun-Camera model", _VARIANT)
VACE = Kind("vace", "a Wan2.1 VACE model", _VARIANT)
# The same of Wan2.2, which has no image branch; VACE of either has none, and a file of 14B may be of both.
OF_WAN22 = {
    FUN_CONTROL: Kind("fun_control_22", "a Wan2.2 Fun-Control model", _VARIANT),
    FUN_CAMERA: Kind("fun_camera_22", "a Wan2.2 Fun-Camera model", _VARIANT),
}
REMOVER = Kind("remover", "a Wan model without text features (MiniMax-Remover)", _VARIANT)
CAUSAL = Kind("causal", "an autoregressive Wan model (Causal-Forcing, Self-Forcing or CausVid)", _VARIANT)
_ADDITION = "it adds to a Wan model what is not read here; load it with the nodes of its own makers"
_WHOLE_KEY = r"(^|\.)(head\.modulation|condition_embedder\.time_proj\.weight)$"
_IMAGE_BRANCH = r"(^|\.)(img_emb|condition_embedder\.image_embedder)\."

# One pattern per kind, searched in the list of keys, one key a line. Any prefix may come first.
RULES: tuple[tuple[Kind, str], ...] = (
    (
        LORA,
        r"(\.(lora_(up|down|A|B)(\.\w+)?(\.weight)?|hada_w[12]_a|lokr_w[12](_a)?|oft_blocks|dora_scale"
        r"|diff|diff_b|diff_m|w_norm)|[._]lora(_linear_layer)?\.up\.weight)$",
    ),
    (VACE, r"(^|\.)vace_(patch_embedding|blocks)\."),
    (Kind("s2v", "a Wan2.2 speech-to-video model", _VARIANT), r"(^|\.)casual_audio_encoder\."),
    (Kind("animate", "a Wan2.2 Animate model", _VARIANT), r"(^|\.)(face_adapter|pose_patch_embedding)\."),
    (
        # `audio_adaLN_modulation` in its release, without adaLN as kijai's files have it.
        Kind("longcat_avatar", "a LongCat-Avatar model", _VARIANT),
        r"(^|\.)blocks\.\d+\.audio_(adaLN_)?modulation\.",
    ),
    (Kind("humo", "a HuMo model, driven by audio", _VARIANT), r"(^|\.)audio_proj\.audio_proj_glob_"),
    (
        Kind("talk", "a MultiTalk, InfiniteTalk or SkyReels talking model, driven by audio", _VARIANT),
        r"(^|\.)((multitalk_)?audio_proj|blocks\.\d+\.audio_cross_attn)\.",
    ),
    (
        Kind("ovi", "an Ovi model, of video with sound", _VARIANT),
        r"(^|\.)(audio|video)_model\.(blocks|head)\.",
    ),
    (Kind("fantasy_talking", "FantasyTalking's weights", _ADDITION), r"(^|\.)proj_model\.proj\."),
    (
        Kind("fantasy_portrait", "a FantasyPortrait or FlashPortrait model", _ADDITION),
        r"(^|\.)cross_attn\.(ip_adapter_single_stream_|emo_)k_proj\.",
    ),
    (Kind("lynx", "Lynx's weights", _ADDITION), r"\.(self_attn\.ref_adapter|cross_attn\.ip_adapter)\."),
    (Kind("stand_in", "Stand-In's weights", _ADDITION), r"\.self_attn\.[qkv]_loras\."),
    (
        Kind("unianimate", "UniAnimate's weights", _ADDITION),
        r"(^|\.)(dwpose_embedding|randomref_embedding_pose)\.",
    ),
    (
        Kind("mtv_crafter", "an MTV-Crafter model", _VARIANT),
        r"(^|\.)blocks\.\d+\.motion_attn\.",
    ),
    (
        Kind("recammaster", "a ReCamMaster model, or another with its camera layers", _VARIANT),
        r"(^|\.)blocks\.\d+\.cam_encoder\.",
    ),
    (
        Kind("steady_dancer", "a SteadyDancer model", _VARIANT),
        r"(^|\.)condition_embedding_(spatial|align)\b",
    ),
    (FUN_CAMERA, r"(^|\.)control_adapter\."),
    (FUN_CONTROL, r"(^|\.)ref_conv\.weight$"),
    (Kind("scail2", "a SCAIL-2 model", _VARIANT), r"(^|\.)patch_embedding_mask\."),
    (Kind("scail", "a SCAIL model", _VARIANT), r"(^|\.)patch_embedding_pose\."),
    (Kind("dancer", "a Wan-Dancer model", _VARIANT), r"(^|\.)patch_embedding_global\."),
    (WAN21_DIT, _WHOLE_KEY),
    (
        Kind("sd", "an SD or SDXL checkpoint", "pick a Wan2.1 file"),
        r"(^|\.)(input_blocks\.\d+\.\d+\.|down_blocks\.\d+\.attentions\.\d+\.proj_in\.)",
    ),
    (
        Kind("longcat", "a LongCat video model, or another of PixArt's layers", "pick a Wan2.1 file"),
        # The release's; then Wan's names for it, as kijai's files have it.
        r"(^|\.)(blocks\.\d+\.cross_attn\.(q|kv)_linear\.|head\.modulation\.1\.weight$)",
    ),
    (
        Kind("mmdit", "a diffusion model of another family (Flux, SD3, HunyuanVideo)", "pick a Wan2.1 file"),
        r"(^|\.)(double_blocks|joint_blocks|transformer_blocks)\.\d+\.",
    ),
    (WAN22_VAE, r"(^|\.)decoder\.(upsamples\.\d+\.upsamples|up_blocks\.\d+\.upsampler)\."),
    (WAN21_VAE, r"(^|\.)decoder\.(middle\.0\.residual\.0|mid_block\.resnets\.0\.norm1)\.gamma$"),
    (OTHER_VAE, r"(^|\.)decoder\..*\.conv(\d|_in|_out)?\.conv\.weight$"),  # HunyuanVideo, LTX
    (
        Kind("kl_vae", "an image VAE (AutoencoderKL of SD, SDXL or Flux)", _VAE),
        r"(^|\.)decoder\.(up_blocks\.\d+\.resnets\.\d+\.norm1|up\.\d+\.block\.\d+\.norm1)\.weight$",
    ),
    (
        Kind("tae", "a TAEHV or TAESD preview decoder", _VAE),
        r"(^|\.)decoder\.\d+\.(bias|conv\.)",
    ),
    (OTHER_VAE, r"(^|\.)decoder\.(up_blocks|up|mid_block|mid|conv_in)\."),
    (
        UMT5,
        r"(^|\.)(encoder\.block\.[1-9]\d*\.layer\.0\.SelfAttention\.relative_attention_bias"
        r"|blocks\.[1-9]\d*\.pos_embedding\.embedding)\.weight$",
    ),
    (T5, r"(^|\.)(encoder\.block\.0\.layer\.0\.SelfAttention\.q|blocks\.0\.attn\.q)\.weight$"),
    (
        CLIP_VISION,
        r"(^|\.)(vision_model\.|visual\.(transformer|trunk|conv1|patch_embedding)\b)",
    ),
    (
        Kind("clip", "a CLIP text encoder", _TEXT),
        r"(^|\.)(encoder\.layers\.\d+\.self_attn\.|transformer\.resblocks\.\d+\.)",
    ),
    (
        Kind("llm", "a language model (LLaMA, Qwen, Gemma or the like)", _TEXT),
        r"(^|\.)layers\.\d+\.(self_attn|linear_attn|input_layernorm|mlp)\.",
    ),
)
# Keys of these beside a whole Wan model are left out, as the host leaves them, and the model itself runs.
_ADDITIONS = frozenset(
    {
        "lora",
        "longcat_avatar",
        "talk",
        "fantasy_talking",
        "fantasy_portrait",
        "lynx",
        "stand_in",
        "unianimate",
        "mtv_crafter",
        "recammaster",
        "steady_dancer",
    }
)
_WHOLE = re.compile(_WHOLE_KEY, re.MULTILINE)
_COMPILED = tuple((kind, re.compile(pattern, re.MULTILINE)) for kind, pattern in RULES)


def detect_kind(state_dict: Mapping[str, Tensor]) -> Kind | None:
    """What a checkpoint is, by its keys (any layout or prefix) and, where those agree, its shapes.

    Returns:
        The kind, or `None` when nothing known matches. A file with several parts is named by its
        diffusion model.
    """
    names = "\n".join(state_dict)
    passed_over = _ADDITIONS if _WHOLE.search(names) else ()
    kind = next((k for k, pattern in _COMPILED if k.name not in passed_over and pattern.search(names)), None)
    if kind is WAN21_DIT:
        kind = _refine_dit(state_dict, names)
    if kind is not None and kind in OF_WAN22 and not re.search(_IMAGE_BRANCH, names, re.MULTILINE):
        return OF_WAN22[kind]
    if kind is WAN21_VAE and _axis(state_dict, r"decoder\.(conv1|conv_in)\.weight", 1) == 48:
        return WAN22_VAE
    if kind is T5 and not re.search(r"(^|\.)(encoder\.block|blocks)\.1\.", names, re.MULTILINE):
        return UMT5  # with one block the two are the same network
    return kind


def addition_in(keys: Iterable[str]) -> Kind | None:
    """Whose weights lie beside a Wan model, by keys it has no place for; None if nobody's known."""
    names = "\n".join(keys)
    return next((k for k, pattern in _COMPILED if k.name in _ADDITIONS and pattern.search(names)), None)


def kind_by_metadata(metadata: Mapping[str, str]) -> Kind | None:
    """What a DiT is that has the keys and shapes of Wan2.1's and is none, by its metadata; None if it is one.

    Read are the switch `config.transformer.causal_ar`, and the classes and architectures that diffusers and
    trainers write. Titles are not: a distilled model of the usual kind may be named after the method.
    """
    config = json_table(metadata.get("config", "{}"), "`config` in its metadata")
    inner = config.get("transformer")
    tables = [config, inner if isinstance(inner, dict) else {}]
    words = [table.get(key) for table in tables for key in ("_class_name", "model_type", "architecture")]
    words += [metadata.get(key) for key in ("modelspec.architecture", "_class_name", "model_type")]
    named = any(re.search(r"causal|autoregressive|self.?forcing", str(word), re.IGNORECASE) for word in words)
    return CAUSAL if named or any(table.get("causal_ar") for table in tables) else None


def not_a(expected: Kind, state_dict: Mapping[str, Tensor]) -> WrongKind:
    """The refusal of a state dict that was to be `expected`, naming what it is instead."""
    kind = detect_kind(state_dict)
    if kind:
        return WrongKind(f"this file is not {expected.what}", f"It is {kind}", kind)
    keys = ", ".join(list(state_dict)[:5]) or "none"
    return WrongKind(
        f"this file is not {expected.what}, nor anything known here. Its first keys: {keys}",
        f"Pick {expected.what}",
    )


def _refine_dit(state_dict: Mapping[str, Tensor], names: str) -> Kind:
    in_dim = _axis(state_dict, r"patch_embedding\.weight", 1, axes=5)
    out_rows = _axis(state_dict, r"(head\.head|proj_out)\.weight", 0)  # 4 per latent channel
    if out_rows == 4 * 48:
        return WAN22_DIT
    if in_dim is not None and in_dim > 36:
        return FUN_CONTROL
    if "patch_embedding." in names and not re.search(r"(^|\.)text_embed(ding|der)\.", names, re.MULTILINE):
        return REMOVER
    return WAN21_DIT


def _axis(state_dict: Mapping[str, Tensor], pattern: str, axis: int, axes: int | None = None) -> int | None:
    """Size of one axis of the first tensor whose name ends in `pattern`; None if it has not so many axes."""
    ending = re.compile(rf"(^|.*\.){pattern}")
    shape = next((tensor.shape for key, tensor in state_dict.items() if ending.fullmatch(key)), ())
    return shape[axis] if len(shape) > axis and axes in (None, len(shape)) else None
