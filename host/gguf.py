"""GGUF checkpoints inside a standard MODEL: matrices stay packed and are unpacked at each use."""

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import torch

from ..wan import files
from ..wan.config import detect_config
from ..wan.dit import WanModel
from ..wan.files.gguf import Packed, dequantize, read_gguf
from ..wan.linear_cpu import linear
from .model import kept_dtype

PLAIN = ("F32", "F16", "BF16")


class GGUFOperations(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        packed = None  # (kind, shape) while `weight` holds the bytes of a file

        def forward_comfy_cast_weights(self, input):
            weight = comfy.model_management.cast_to(self.weight, None, input.device)
            if weight.dtype == torch.uint8:
                weight = dequantize(weight, *self.packed, input.dtype)
            weight = weight.to(input.dtype)
            for function in self.weight_function:
                weight = function(weight)
            bias = None
            if self.bias is not None:
                bias = comfy.model_management.cast_to(self.bias, input.dtype, input.device, copy=True)
                for function in self.bias_function:
                    bias = function(bias)
            return linear(input, weight, bias)

        # How the host merges a patch of another LoRA loader: what is patched is kept unpacked.
        def convert_weight(self, weight, inplace=False, **kwargs):
            return dequantize(weight.to(torch.uint8), *self.packed) if self.packed else weight

        def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
            weight = weight.to(self.bias.dtype)
            if return_weight:
                return weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


def load_gguf(path, build, choose_dtype):
    """Read a GGUF file of a Wan2.1 DiT into a standard MODEL.

    Args:
        build: `build(model_config, config, device)` -> the host's base model around our DiT.
        choose_dtype: `choose_dtype(model_config, state_dict, load_device)` sets the compute dtype.
    """
    packed = read_gguf(path)
    shapes = {key: torch.empty(p.shape, device="meta") for key, p in packed.items()}
    by_tensor = {id(shapes[key]): packed[key] for key in packed}
    shapes = files.to_wan_dit_keys(shapes)
    weights = {key: by_tensor[id(tensor)] for key, tensor in shapes.items()}
    config = detect_config(shapes)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in WanModel(config, torch.nn).state_dict().items()}
    files.check_keys(expected, shapes)
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    model_config = comfy.model_detection.model_config_from_unet(shapes, "")
    choose_dtype(model_config, shapes, load_device)
    model_config.custom_operations = GGUFOperations
    model = build(model_config, config, torch.device("meta"))
    model.device = offload_device
    _assign(model.diffusion_model, weights, copy=not management.is_device_cpu(load_device))
    return comfy.model_patcher.ModelPatcher(model, load_device=load_device, offload_device=offload_device)


def _assign(dit, weights: dict[str, Packed], copy):
    """Give the model its weights: matrices packed, the rest unpacked to the dtype of its parameter.

    Args:
        copy: packed ones into memory, from where a device can fetch them fast; else they stay in the file.
    """
    layers = dict(dit.named_modules())
    for key, weight in weights.items():
        owner, _, name = key.rpartition(".")
        layer = layers[owner]
        if isinstance(layer, GGUFOperations.Linear) and name == "weight" and weight.kind not in PLAIN:
            layer.packed = (weight.kind, weight.shape)
            value = weight.data.clone() if copy else weight.data
        else:
            value = dequantize(*weight, kept_dtype(layer, name))
        setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
