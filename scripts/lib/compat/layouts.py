"""Layouts in which published files hold their weights: each function writes one.

Given a path and the plain weights (diffusion model, VAE, umT5 or LoRA), it returns the numbers that the file
holds under plain names, None where they are the plain ones, and {} where they have no plain form.
"""

import functools
import json
import shutil

from ..gguf_files import write_dit, write_umt5
from .checkpoints import METADATA, write_family


def save(path, weights):
    """A safetensors file."""
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in weights.items()}, path, metadata=METADATA)


def plain(path, weights):
    save(path, weights)


def cast(dtype, matrices_only=False):
    """All weights, or only the matrices, in another type."""

    def write(path, weights):
        import torch

        of = {k: v.to(getattr(torch, dtype)) if _floats(v, matrices_only) else v for k, v in weights.items()}
        save(path, of)
        return {k: v.float() if v.is_floating_point() else v for k, v in of.items()}

    return write


def _floats(tensor, matrices_only):
    return tensor.is_floating_point() and (tensor.ndim == 2 or not matrices_only)


def scaled_fp8(path, weights):
    """One scale a matrix, in ComfyUI's older form: `scaled_fp8` and `scale_weight`."""
    import torch

    stored, exact = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}, dict(weights)
    for key, weight in weights.items():
        if _of_block(key, weight):
            scale = weight.abs().max() / 448
            stored[key] = (weight / scale).to(torch.float8_e4m3fn)
            stored[key.replace(".weight", ".scale_weight")] = scale
            exact[key] = stored[key].float() * scale
        else:
            stored[key] = weight
    save(path, stored)
    return exact


def _of_block(key, weight):
    return "block" in key and key.endswith(".weight") and weight.ndim == 2 and "bias" not in key


def quantised(name):
    """A quantised format of the host, with `comfy_quant` marks."""

    def write(path, weights):
        import comfy.quant_ops as quant
        import torch

        stored, exact = dict(weights), dict(weights)
        layout = quant.QUANT_ALGOS[name]["comfy_tensor_layout"]
        mark = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
        for key, weight in weights.items():
            if _of_block(key, weight):
                more = {"scale": "recalculate"} if name != "mxfp8" else {}
                packed = quant.QuantizedTensor.from_float(weight, layout, **more)
                stored |= packed.state_dict(key) | {key.removesuffix("weight") + "comfy_quant": mark.clone()}
                exact[key] = packed.dequantize()
        save(path, stored)
        return exact

    return write


def renamed(rename):
    """Other names for the same weights."""

    def write(path, weights):
        save(path, {rename(k): v for k, v in weights.items()})

    return write


def prefixed(prefix):
    return renamed(lambda key: prefix + key)


def diffusers_dit(path, weights):
    from wan21.wan.files.keys import DIT_BLOCK_MODULES, DIT_MODULES

    blocks = {wan: theirs for theirs, wan in DIT_BLOCK_MODULES.items()}
    top = {wan: theirs for theirs, wan in DIT_MODULES.items()}
    save(path, {_renamed(key, top, blocks): v for key, v in weights.items()})


def _renamed(key, top, blocks):
    for start, table in (("", top), (".".join(key.split(".")[:2]) + ".", blocks)):
        inner = key.removeprefix(start)
        for name, theirs in table.items():
            if key.startswith(start) and (inner == name or inner.startswith(name + ".")):
                return start + theirs + inner.removeprefix(name)
    return key


def with_extra_keys(path, weights):
    import torch

    save(path, weights | {"fps_embedding.weight": torch.zeros(2, 8), "rope.freqs_cos": torch.zeros(8, 8)})


def without_a_key(path, weights):
    save(path, dict(list(weights.items())[1:]))
    return {}


def truncated(path, weights):
    save(path, weights)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def sharded(path, weights):
    """Two shards, each with its share; `path` is the first."""
    keys = list(weights)
    second = path.with_name(path.name.replace("-00001-", "-00002-"))
    for part, name in ((keys[::2], path), (keys[1::2], second)):
        save(name, {k: weights[k] for k in part})


def all_in_one(others):
    """A whole-pipeline file.

    Args:
        others: names of the other parts' files by folder below `models`.
    """

    def write(path, weights):
        from safetensors.torch import load_file

        below = {"vae": "vae.", "text_encoders": "text_encoders.umt5xxl.transformer."}
        whole = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
        for folder, name in others.items():
            part = load_file(path.parent.with_name(folder) / name)
            whole |= {below[folder] + k: v for k, v in part.items()}
        save(path, whole)

    return write


def other(folder, name):
    """The file of this name from another folder below `models`."""

    def write(path, weights):
        shutil.copyfile(path.parent.with_name(folder) / name, path)

    return write


def without(key):
    def write(path, weights):
        save(path, {k: v for k, v in weights.items() if k != key})

    return write


def family(kind):
    """A diffusion model of one of `FAMILIES`."""
    return lambda path, weights: write_family(path, kind) or {}


def pickled(path, weights):
    import torch

    torch.save(weights, path)


def gguf_dit(kind):
    def write(path, weights):
        import gguf

        return write_dit(weights, path, gguf.GGMLQuantizationType[kind])

    return write


def gguf_umt5(path, weights):
    return write_umt5(weights, path)


def of_module(module, name, config):
    """Random weights of a class of the host's: a file of another kind."""

    def write(path, weights):
        import importlib

        import torch

        from ..random_checkpoints import save_random

        with torch.device("meta"):
            model = getattr(importlib.import_module(module), name)(**config)
        save_random(path, model, "float16", 0)

    return write


def keys(*shapes):
    """Zeros under the key names of a file of another kind: (name, shape)."""

    def write(path, weights):
        import torch

        save(path, {name: torch.zeros(shape) for name, shape in shapes})

    return write


# --- LoRAs: written from one in ComfyUI's layout ---------------------------------------------------


def dialect(module, down="lora_A.weight", up="lora_B.weight", alpha=False):
    """Other names for a LoRA's layers and factors.

    Args:
        module: gives a layer's name from Wan's own.
        down, up: endings of its factors.
        alpha: whether each layer has one, twice its rank.
    """

    def write(path, weights):
        import torch

        ends, stored, exact = {"lora_A.weight": down, "lora_B.weight": up}, {}, {}
        for key, value in weights.items():
            layer, _, role = key.removeprefix("diffusion_model.").partition(".lora_")
            stored[f"{module(layer)}.{ends[f'lora_{role}']}"] = value
            exact[key] = 2 * value if alpha and role.startswith("B") else value
            if alpha and role.startswith("A"):
                stored[f"{module(layer)}.alpha"] = torch.tensor(2.0 * value.shape[0])
        save(path, stored)
        return exact

    return write


def diffusers_layer(layer):
    """Diffusers' name of a layer of the blocks."""
    from wan21.wan.files.keys import DIT_BLOCK_MODULES

    return _renamed(layer, {}, {wan: theirs for theirs, wan in DIT_BLOCK_MODULES.items()})


def with_layers(build):
    """A LoRA of another arithmetic.

    Args:
        build: (rows, columns, randn) -> tensors by role; called for every layer of the plain one.
    """

    def write(path, weights):
        import torch

        g, stored = torch.Generator().manual_seed(5), {}
        for key, up in weights.items():
            if key.endswith("lora_B.weight"):
                layer = key.removesuffix(".lora_B.weight")
                columns = weights[f"{layer}.lora_A.weight"].shape[1]
                made = build(up.shape[0], columns, functools.partial(torch.randn, generator=g))
                stored |= {f"{layer}.{role}": value for role, value in made.items()}
        save(path, stored)
        return {}

    return write


def with_strange_keys(path, weights):
    import torch

    ends = {"lora_A.weight": (4, 8), "lora_B.weight": (8, 4)}
    more = {f"diffusion_model.blocks.0.motion.{end}": torch.ones(shape) for end, shape in ends.items()}
    save(path, weights | more)


def with_nan(path, weights):
    first = next(iter(weights))
    save(path, weights | {first: weights[first] * float("nan")})
