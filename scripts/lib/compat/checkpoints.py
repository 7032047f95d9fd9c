"""Small random files of every kind that the page speaks of, under the key names of real ones."""

import json
import re

from ..random_checkpoints import DIT_SIZE, FLF2V, I2V, T2V, TEXT_DIM, make_checkpoints, save_random

SECOND = "compat-i2v-second.safetensors"
LORA = "compat-lora.safetensors"
METADATA = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM}})}
CAUSAL = {"config": json.dumps({"transformer": {"text_dim": TEXT_DIM, "causal_ar": True}})}

# Families of diffusion models: module and class of the host that has them, and what it is made with.
WAN, ANIMATE, DANCER = "comfy.ldm.wan.model", "comfy.ldm.wan.model_animate", "comfy.ldm.wan.model_wandancer"
FAMILIES = {
    "i2v-22-high": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 36}),
    "i2v-22-low": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 36}),
    "t2v-low": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 16}),
    "causal-forcing": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 16}),
    "fun-control": (WAN, "WanModel", {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16}),
    "fun-control-22": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 52, "in_dim_ref_conv": 16}),
    "5b": (WAN, "WanModel", {"model_type": "t2v", "in_dim": 48, "out_dim": 48}),
    "vace": (WAN, "VaceWanModel", {"vace_layers": 1, "vace_in_dim": 96}),
    "fun-camera": (WAN, "CameraWanModel", {"model_type": "camera", "in_dim": 32}),
    "fun-camera-22": (WAN, "CameraWanModel", {"model_type": "camera_2.2", "in_dim": 36}),
    "s2v": (WAN, "WanModel_S2V", {"audio_inject_layers": [0]}),
    "humo": (WAN, "HumoWanModel", {"in_dim": 36}),
    "scail": (WAN, "SCAILWanModel", {}),
    "scail2": (WAN, "SCAIL2WanModel", {}),
    "animate": (ANIMATE, "AnimateWanModel", {"in_dim": 36}),
    "dancer": (DANCER, "WanDancerModel", {"in_dim": 36}),
}
BASE = {"i2v": I2V, "flf2v": FLF2V, "t2v": T2V}
# The family of a published file by its name; the first that fits.
BY_NAME = (
    (r"causal_forcing", "causal-forcing"), (r"scail2", "scail2"), (r"scail", "scail"), (r"vace", "vace"),
    (r"dancer", "dancer"), (r"humo", "humo"), (r"s2v", "s2v"), (r"animate", "animate"), (r"5b", "5b"),
    (r"2\.2.*fun_camera", "fun-camera-22"), (r"fun_camera", "fun-camera"),
    (r"2\.2.*fun_control", "fun-control-22"), (r"fun_control", "fun-control"),
    (r"2\.2.*(i2v|inpaint).*high", "i2v-22-high"), (r"2\.2.*(i2v|inpaint).*low", "i2v-22-low"),
    (r"flf2v", "flf2v"), (r"(t2v|bernini).*low", "t2v-low"), (r"t2v|bernini|phantom", "t2v"),
    (r"i2v|fun_inp|wanmove|chrono_edit", "i2v"),
)  # fmt: skip


def dit_kind(name):
    """The family of a published diffusion model, by its file name; None: an unknown one."""
    return next((kind for pattern, kind in BY_NAME if re.search(pattern, name.lower())), None)


def dit_file(kind):
    """Name in `diffusion_models` of the small file of a family."""
    return BASE.get(kind) or f"compat-{kind}.safetensors"


def make_models(folder, families=FAMILIES):
    """Write the base files, one model of every family, a second i2v model and a LoRA; return the folder."""
    from safetensors.torch import load_file, save_file

    models = make_checkpoints(folder)
    dits = models / "diffusion_models"
    for kind in families:
        write_family(dits / dit_file(kind), kind)
    weights = load_file(dits / I2V)
    save_file(noisy(weights, 0.3), dits / SECOND, metadata=METADATA)
    (models / "loras").mkdir()
    save_file(low_rank(weights), models / "loras" / LORA)
    return models


def write_family(path, kind):
    """The small file of one of `FAMILIES`."""
    import importlib

    import comfy.ops

    module, name, config = FAMILIES[kind]
    build = getattr(importlib.import_module(module), name)
    model = build(**DIT_SIZE | config, device="meta", operations=comfy.ops.disable_weight_init)
    seed = 1 + list(FAMILIES).index(kind)
    save_random(path, model, "bfloat16", seed, CAUSAL if kind == "causal-forcing" else METADATA)


def noisy(weights, share, seed=1):
    """The weights with noise of this share of each one's spread."""
    import torch

    g = torch.Generator().manual_seed(seed)
    return {k: v + share * v.std() * torch.randn(v.shape, generator=g) for k, v in weights.items()}


def low_rank(weights, rank=4, seed=2):
    """A LoRA in ComfyUI's layout on every matrix of the blocks that text-to-video models have too."""
    import torch

    g, found = torch.Generator().manual_seed(seed), {}
    for key, weight in weights.items():
        if key.startswith("blocks.") and weight.ndim == 2 and key.endswith(".weight") and "_img" not in key:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            rows, columns = weight.shape
            found[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=g) / columns**0.5
            found[f"{name}.lora_B.weight"] = torch.randn(rows, rank, generator=g) / (rank * columns) ** 0.5
    return found
