"""The dialects of published LoRA files: each key becomes one of Wan's own layers and the role of its tensor.

Read here: Wan's own names and diffusers' (`attn1.to_q`), bare or below `diffusion_model.`, `transformer.`,
`base_model.model.` (PEFT), `pipe.dit.` (DiffSynth) and the like; kohya's and musubi's
`lora_unet_blocks_0_self_attn_q`, the double underscore of Wan2.1-Fun, and SimpleTuner's `lycoris_`.
"""

import re

from .keys import DIT_BLOCK_MODULES, DIT_MODULES, wan_dit_key

PREFIXES = (
    "base_model.model.", "pipe.dit.", "model.diffusion_model.", "diffusion_model.", "transformer.",
    "transformer_2.", "unet.", "model.", "net.", "dit.", "module.", "generator.",
)  # fmt: skip
COMPILED = "_orig_mod."  # torch.compile puts it before the names of a module that it wraps
UNDERSCORED_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
TEXT_PREFIXES = ("lora_te", "text_encoder", "text_encoders", "te_", "conditioner")
BARE_PARAMETERS = ("modulation", "emb_pos")  # parameters whose names have no .weight after them

# The end of a key says what its tensor is. `lora_A.default.weight` carries PEFT's adapter name.
_ROLE = re.compile(
    r"""(?P<module>.+?)
    (?: \.lora_(?P<factor>A|B|down|up|mid)(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<part>weight|bias))?
      | [._]lora(?:_linear_layer)?\.(?P<factor2>down|up)\.weight
      | \.(?P<magnitude>dora_scale|lora_magnitude_vector)(?:\.[^.]+){0,2}
      | \.(?P<role>alpha|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2
                  |diff|diff_b|diff_m|w_norm|b_norm)
    )""",
    re.VERBOSE,
)
_FACTORS = {"A": "down", "B": "up"}
_ALIASES = {"w_norm": "diff", "b_norm": "diff_b"}

_TOP_MODULES = {"patch_embedding", "head", *DIT_MODULES, *DIT_MODULES.values()}
_BLOCK_MODULES = {*DIT_BLOCK_MODULES, *DIT_BLOCK_MODULES.values()}
_DOTTED_TOP = {name.replace(".", "_"): name for name in _TOP_MODULES}
_DOTTED_BLOCK = {name.replace(".", "_"): name for name in _BLOCK_MODULES}


def split_lora_key(key: str) -> tuple[str, str] | None:
    """The layer and the role that a key of any dialect means.

    Returns:
        (layer under Wan's own name, role), for example
        `lora_unet_blocks_3_attn1_to_q.lora_down.weight` -> (`blocks.3.self_attn.q`, `down`). Roles: `down`,
        `mid`, `up`, `up_bias`, `alpha`, `magnitude` (DoRA), `hada_*`, `lokr_*`, `diff`, `diff_b`, `diff_m`.
        A layer that is none of Wan's keeps its name. `None`: the key's end is no role.
    """
    match = _ROLE.fullmatch(key)
    if match is None:
        return None
    return wan_dit_key(bare_module(match["module"])), _role(match)


def _role(match: re.Match) -> str:
    factor = match["factor"] or match["factor2"]
    if factor:
        role = _FACTORS.get(factor) or factor
        return f"{role}_bias" if match["part"] == "bias" else role
    role = match["role"]
    return "magnitude" if match["magnitude"] else _ALIASES.get(role) or role


def bare_module(module: str) -> str:
    """A layer's dotted name without the dialect's prefix; names are Wan's or diffusers'."""
    module = module.replace(COMPILED, "")
    underscored = next((p for p in UNDERSCORED_PREFIXES if module.startswith(p)), None)
    module = module.removeprefix(underscored or "")
    while prefix := next((p for p in PREFIXES if module.startswith(p)), None):
        module = module.removeprefix(prefix)
    name = module.replace(".", "_")  # some files dot only a part of the name
    if name in _DOTTED_TOP:
        return _DOTTED_TOP[name]
    block = re.fullmatch(r"blocks_(\d+)(?:_(.+))?", name)
    if block is None or not (underscored or block[2] in _DOTTED_BLOCK):
        return module
    inner = block[2] and "." + _DOTTED_BLOCK.get(block[2], block[2])
    return f"blocks.{block[1]}{inner or ''}"


def parameter_of(module: str, role: str) -> str:
    """The model's parameter that a role of a layer changes: its weight, its bias, or a bare parameter."""
    if role in ("diff_b", "up_bias"):
        return f"{module}.bias"
    if role == "diff_m":
        return f"{module}.modulation"
    return module if module.rpartition(".")[2] in BARE_PARAMETERS else f"{module}.weight"
