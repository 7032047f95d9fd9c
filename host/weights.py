"""Checkpoints into a standard MODEL: which dtype weights are stored in, and no second copy of them."""

import json
from functools import partial
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.quant_ops
import comfy.utils
import torch
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..wan import files
from ..wan.config import detect_config
from ..wan.dit import WanModel
from ..wan.linear_cpu import linear
from ..wan.refusal import Refusal
from .gguf import load_gguf
from .model import Wan21, kept_dtype
from .progress import tell

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_FAST = "fp8_e4m3fn_fast"
WEIGHT_DTYPES = DTYPES | {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    FP8_FAST: torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
MARK = ".comfy_quant"
TWO_A_BYTE = ("nvfp4", "convrot_w4a4")  # of the host's formats: neighbours of a row share a byte


def load_model(path, weight_dtype="default", disable_dynamic=False):
    """Read a Wan2.1 checkpoint of any published layout, or a GGUF file, into a standard MODEL."""
    if str(path).lower().endswith(".gguf"):
        return _load_gguf(path, weight_dtype)
    state_dict, metadata = files.read_checkpoint(path)
    state_dict = files.to_wan_dit_keys(state_dict)
    state_dict, metadata = with_formats(state_dict, metadata)
    files.refuse_loose_scales(state_dict)
    formats = _quantised_layers(state_dict)
    shapes = _unpacked_shapes(state_dict, formats)
    config = detect_config(shapes, metadata)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in WanModel(config, torch.nn).state_dict().items()}
    files.check_keys(expected, shapes)
    model_config = comfy.model_detection.model_config_from_unet(state_dict, "", metadata=metadata)
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    _choose_dtype(model_config, state_dict, load_device, weight_dtype)
    stored = _stored_dtypes(model_config, state_dict, expected, weight_dtype)
    quantised = model_config.quant_config is not None
    _tell_unpacked(set(formats.values()), load_device)
    # The host's quantised layers put what they load on the device they were built on.
    device = None if quantised else torch.device("meta")
    model = Wan21(model_config, config, Path(path), metadata or {}, device, stored)
    model.device = offload_device
    patcher_class = (
        comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    )
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    # The host's fp8 multiplication asks for the dtype before a weight is loaded, where that is at its use.
    if not quantised and (weight_dtype == FP8_FAST or not patcher.is_dynamic()):
        _convert(model.diffusion_model, state_dict, _is_mapped(load_device))
    model.load_model_weights(state_dict, "", assign=not quantised or patcher.is_dynamic())
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    # The host builds further patchers of this model (hooks, several GPUs) from this recipe.
    patcher.cached_patcher_init = (load_model, (path, weight_dtype))
    return patcher


def with_formats(state_dict, metadata):
    """Mark every quantised layer with its format as the host's layers read it (`<layer>.comfy_quant`).

    The host takes all weights with scales for e4m3 and would convert those in e5m2, where some are too large.

    Returns:
        (state dict, metadata)
    """
    old = "scaled_fp8"  # one for each part of a whole-pipeline checkpoint
    for prefix in [key.removesuffix(old) for key in state_dict if key.endswith(old)] or [""]:
        state_dict, metadata = comfy.utils.convert_old_quants(state_dict, prefix, metadata=metadata)
    for layer in [key.removesuffix(MARK) for key in state_dict if key.endswith(MARK)]:
        weight = state_dict.get(f"{layer}.weight")
        if weight is not None and weight.dtype == torch.float8_e5m2:
            config = json.loads(state_dict[layer + MARK].numpy().tobytes()) | {"format": "float8_e5m2"}
            state_dict[layer + MARK] = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    return state_dict, metadata


def _quantised_layers(state_dict):
    """{layer: format} of what is stored in the host's quantised formats.

    Raises:
        Refusal: the host does not have one of them.
    """
    formats = {}
    for key, value in state_dict.items():
        layer, _, name = key.rpartition(".")
        if name == "comfy_quant":
            formats[layer] = json.loads(value.numpy().tobytes()).get("format")
    known = comfy.quant_ops.QUANT_ALGOS if comfy.quant_ops._CK_AVAILABLE else {}
    unknown = sorted({str(name) for name in formats.values()} - known.keys())
    if unknown:
        raise Refusal(
            f"weights are stored as {', '.join(unknown)}, and this ComfyUI reads "
            f"{', '.join(known) or 'no such format'}",
            "Update ComfyUI with its package comfy-kitchen, or pick another file",
        )
    return formats


def _unpacked_shapes(state_dict, formats):
    """The state dict with packed weights replaced by what they stand for, without data."""
    packed = [f"{layer}.weight" for layer, name in formats.items() if name in TWO_A_BYTE]
    shapes = {key: state_dict[key].shape for key in packed if key in state_dict}
    return state_dict | {
        k: torch.empty(rows, 2 * columns, device="meta") for k, (rows, columns) in shapes.items()
    }


def _tell_unpacked(formats, device):
    """Say which formats the host unpacks before each multiplication on this device."""
    management = comfy.model_management
    multiplies = {"nvfp4": management.supports_nvfp4_compute, "mxfp8": management.supports_mxfp8_compute}
    multiplies |= dict.fromkeys(("float8_e4m3fn", "float8_e5m2"), management.supports_fp8_compute)
    unpacked = sorted(name for name in formats & multiplies.keys() if not multiplies[name](device))
    if unpacked:
        device_name = management.get_torch_device_name(device)
        tell(
            f"{device_name} cannot multiply in {', '.join(unpacked)}: weights are unpacked at each use",
        )


def check_compile(model):
    """Refuse code that the device's compiler cannot make.

    Raises:
        Refusal: the MODEL is compiled for an NVIDIA GPU below 8.9 with weights in float8_e4m3fn.
    """
    compiled = model.model_options.get(TORCH_COMPILE_KWARGS)
    if not compiled or compiled["backend"] != "inductor" or model.load_device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(model.load_device)
    if not comfy.model_management.is_nvidia() or capability >= (8, 9):
        return
    layers = model.model.diffusion_model.modules()
    if any(kept_dtype(layer, "weight") == torch.float8_e4m3fn for layer in layers if _has_weight(layer)):
        raise Refusal(
            f"the MODEL is compiled and its weights are fp8_e4m3fn, which torch.compile cannot convert on a "
            f"GPU of compute capability {capability[0]}.{capability[1]} (it takes 8.9: RTX 40, L4, H100)",
            "Remove TorchCompileModel, or set weight_dtype to fp8_e5m2 or bf16 (of a file that is not fp8)",
        )


def _has_weight(layer):
    return getattr(layer, "weight", None) is not None


def _is_mapped(load_device):
    """Whether weights may stay mapped from the file while the model is there.

    On a CPU they are read where they lie. Pages are copied when written to, so no patch reaches the file, and
    a file that is deleted or replaced under its name stays readable; one that is cut short in place does
    not, and Windows refuses to delete it. For another device they are copied once, because the host pins
    what it streams and moves the rest; with --disable-mmap as well.
    """
    return comfy.model_management.is_device_cpu(load_device) and not comfy.utils.DISABLE_MMAP


def _convert(dit, state_dict, mapped):
    """Give each tensor the dtype of its parameter, one after the other, in the state dict itself."""
    for key, value in state_dict.items():
        owner, _, name = key.rpartition(".")
        state_dict[key] = value.to(kept_dtype(dit.get_submodule(owner), name), copy=not mapped)


def _load_gguf(path, weight_dtype):
    if weight_dtype != "default":
        raise Refusal(
            f"weight_dtype is {weight_dtype}, and GGUF weights stay packed as they are",
            "Set weight_dtype to default",
        )

    def build(model_config, config, device):
        return Wan21(model_config, config, Path(path), {}, device)

    patcher = load_gguf(path, build, partial(_choose_dtype, weight_dtype=weight_dtype))
    patcher.cached_patcher_init = (load_model, (path, weight_dtype))
    return patcher


def _choose_dtype(model_config, state_dict, load_device, weight_dtype):
    """Storage and compute dtype; layers that cast at each call.

    The compute dtype is the host's choice. By default weights are stored as in the file, but float32 ones
    only where the host computes in float32: twice the memory would give no other numbers.
    """
    management = comfy.model_management
    dtype = WEIGHT_DTYPES.get(weight_dtype)
    quantised = model_config.quant_config is not None
    if quantised and dtype is not None:
        raise Refusal(
            f"weight_dtype is {weight_dtype}, and the weights of this file are quantised; they stay as they "
            "are stored",
            "Set weight_dtype to default",
        )
    supported = list(model_config.supported_inference_dtypes)
    stored = None if quantised else comfy.utils.weight_dtype(state_dict)
    chosen = dtype or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state_dict),
        supported_dtypes=supported,
        weight_dtype=stored,
    )
    cast = management.unet_manual_cast(None if quantised else chosen, load_device, supported)
    kept = stored is not None and management.supports_cast(load_device, stored)  # not fp8 on a Mac
    if dtype is None and kept and stored.itemsize <= chosen.itemsize and stored != chosen:
        chosen, cast = stored, cast or chosen
    model_config.set_inference_dtype(chosen, cast, device=load_device)
    if weight_dtype == FP8_FAST:
        model_config.custom_operations = _fp8_matmul(load_device)
    elif not quantised:  # the time embedding is float32 whatever the weights are, so layers must cast
        on_cpu = comfy.model_management.is_device_cpu(load_device)
        model_config.custom_operations = CpuOperations if on_cpu else comfy.ops.manual_cast


class CpuOperations(comfy.ops.manual_cast):
    """The host's layers that cast at each call, with our matrix product."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input):
            weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            y = linear(input, weight, bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return y


def _stored_dtypes(model_config, state_dict, expected, weight_dtype):
    """Dtypes by key of weights that stay as they are in the file; empty where another was chosen."""
    chosen = model_config.unet_config["dtype"]
    asked = weight_dtype != "default" or model_config.quant_config is not None
    if asked or chosen != comfy.utils.weight_dtype(state_dict):
        return {}
    return {key: state_dict[key].dtype for key in expected}


def _fp8_matmul(device):
    """The host's operations that multiply in fp8, where the device can."""
    if not comfy.model_management.supports_fp8_compute(device):
        name = comfy.model_management.get_torch_device_name(device)
        raise Refusal(
            f"weight_dtype is {FP8_FAST}, and {name} cannot multiply in fp8 (that takes an NVIDIA GPU of "
            "compute capability 8.9 or newer: RTX 40, L4, H100)",
            "Set fp8_e4m3fn, which stores in fp8 and computes in higher precision",
        )
    return comfy.ops.fp8_ops
