"""A checkpoint, safetensors or GGUF, into a standard MODEL, in the dtype chosen and without a second copy.

`load_model` is the one path; what differs between the two kinds of file is in the two classes that read them.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy.cli_args import args
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP
from comfy.supported_models_base import BASE
from torch import Tensor, nn

from ..wan import files
from ..wan.config import detect_config
from ..wan.device import multiplies_in_bf16
from ..wan.dit import WanModel
from ..wan.files.gguf import BLOCKS, dequantize, read_gguf
from ..wan.files.marks import check_scales, unpacked_shapes
from ..wan.refusal import Refusal
from .eight_bits import EIGHT_BITS, FP8_ROWS, INT8, quantised
from .fp16_sums import FP16_FAST, IN_FP16_SUMS, check_fp16_sums
from .guide import sample_with_guide
from .lora import work_in_at_use
from .model import Wan21, refuse_replaced, refuse_unread
from .operations import GGUFOperations, casting_operations, fp8_operations
from .products import multiply_by_rows
from .progress import tell, tell_left_out
from .quantised import multiply_exactly, quantised_layers, tell_unpacked, unpacked_formats, with_formats
from .reader import read_checkpoint
from .stored import PackedPatcher, kept_dtype

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FP8_FAST = "fp8_e4m3fn_fast"
STORED_AS = DTYPES | {
    "fp8_e4m3fn": torch.float8_e4m3fn,
    FP8_FAST: torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    FP16_FAST: torch.float16,
}
WEIGHT_DTYPES = (*STORED_AS, *EIGHT_BITS)
IN_BF16 = "computed in bf16, which this CPU multiplies itself; weight_dtype fp32 is the exact and slower way"
PLAIN = ("F32", "F16", "BF16")  # GGUF types that are unpacked when read


def load_model(
    path: str | Path, weight_dtype: str = "default", disable_dynamic: bool = False
) -> ModelPatcher:
    """A standard MODEL from a Wan2.1 checkpoint of any published layout, or from a GGUF file.

    Args:
        path: see `wan.files.read_checkpoint`; GGUF by its ending.
        weight_dtype: how weights are stored, a name of `WEIGHT_DTYPES`; by default as in the file.
        disable_dynamic: whether all weights are to be there before they are used, as the host asks for a
            patcher without its dynamic memory.

    Raises:
        Refusal: the file is damaged, something else or quantised in a way that is not read; or
            `weight_dtype` is not for it, or not for the device.
    """
    path = Path(path)
    refuse_missing_fp8(weight_dtype, comfy.model_management.get_torch_device())
    is_gguf = path.suffix.lower() == ".gguf"
    file = _GGUFFile(path, weight_dtype) if is_gguf else _Safetensors(path, weight_dtype)
    config = detect_config(file.shapes, file.metadata)
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in WanModel(config, nn).state_dict().items()}
    left_out = files.check_keys(expected, file.shapes) + _unread_marks(file)
    notes = [tell_left_out(path.name, left_out)]
    for key in left_out:
        file.leave_out(key)
    file.quantise()
    # Without the file's metadata, of which the host would believe any size, and which `config` is read from.
    host_config = comfy.model_detection.model_config_from_unet(file.detected, "")
    if host_config is None:  # as of 16 channels with an image branch
        raise Refusal(
            f"ComfyUI knows no Wan model of {config.in_dim} channels with these keys, its own loader neither",
            "Pick a Wan2.1 t2v, i2v or flf2v file, or load this one with the nodes of its own makers",
        )
    host_config.unet_config |= {"num_heads": config.num_heads, "text_dim": config.text_dim}
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    notes.append(_choose_dtype(host_config, file, load_device, weight_dtype))
    if operations := file.operations(load_device):
        host_config.custom_operations = operations  # pyright: ignore[reportAttributeAccessIssue]
    model = Wan21(host_config, config, path, file.metadata, file.built_on, file.stored(host_config))
    model.diffusion_model.sums_in_fp16 = weight_dtype == FP16_FAST
    model.device, model.file_notes = offload_device, [note for note in notes if note]
    host_patcher = ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher_class = PackedPatcher if is_gguf else host_patcher
    patcher = patcher_class(model, load_device=load_device, offload_device=offload_device)
    patcher.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "wan21", refuse_unread)
    patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "wan21", sample_with_guide)
    patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, "wan21", refuse_replaced)
    work_in_at_use(patcher)
    file.fill(model, patcher)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    # The host builds further patchers of this model (hooks, several GPUs) from this recipe.
    patcher.cached_patcher_init = (load_model, (path, weight_dtype))
    return patcher


def refuse_missing_fp8(weight_dtype: str, device: torch.device) -> None:
    """Refuses to store weights in fp8 for a device that has no such numbers.

    Raises:
        Refusal: says what to choose.
    """
    dtype = torch.float8_e4m3fn if weight_dtype == FP8_ROWS else STORED_AS.get(weight_dtype)
    if dtype is None or dtype.itemsize > 1 or comfy.model_management.supports_cast(device, dtype):
        return
    raise Refusal(
        f"weight_dtype is {weight_dtype}, and {comfy.model_management.get_torch_device_name(device)} has no "
        "numbers in fp8",
        f"Set weight_dtype to {INT8}, which halves the memory of the feed-forward there, or to default",
    )


def _unread_marks(file: "_Safetensors | _GGUFFile") -> list[str]:
    """Scales and marks of layers that are not quantised: the host's layers have no place for them."""
    return [
        key
        for key in file.shapes
        if files.is_quantization_key(key) and key.rpartition(".")[0] not in file.formats
    ]


def notes_on_file(model: ModelPatcher) -> list[str]:
    """What was said of a MODEL's file when it was loaded, for the report of a run."""
    return list(getattr(model.model, "file_notes", ()))


def _choose_dtype(
    host_config: BASE, file: "_Safetensors | _GGUFFile", load_device: torch.device, weight_dtype: str
) -> str:
    """Sets storage and compute dtype; gives what is to be said of it, or nothing.

    The compute dtype is the host's choice. For a file in bf16 it is offered bf16 first: that is what Wan2.1's
    release computes in, and fp16 would overflow sooner and cast every weight at every use. By default weights
    are stored as in the file. On a CPU the host computes in float32 whatever is asked; where the CPU has
    products in bf16, who asks for bf16 gets them.
    """
    management = comfy.model_management
    if weight_dtype == FP16_FAST:
        check_fp16_sums(load_device)
    dtype = STORED_AS.get(weight_dtype)
    quantised = host_config.quant_config is not None
    if quantised and dtype is not None:
        raise Refusal(
            f"weight_dtype is {weight_dtype}, and the weights of this file are quantised; they stay as they "
            "are stored",
            "Set weight_dtype to default",
        )
    supported = list(host_config.supported_inference_dtypes)
    stored = file.dtype
    if stored == torch.bfloat16:
        supported.sort(key=lambda dtype: dtype != stored)
    chosen = dtype or management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(file.detected),
        supported_dtypes=supported,
        weight_dtype=stored,
    )
    cast = management.unet_manual_cast(None if quantised else chosen, load_device, supported)
    if dtype is None and stored is not None and not quantised and _keeps(load_device, stored, chosen):
        chosen, cast = stored, cast or chosen
    note = ""
    asked = weight_dtype == "bf16" or (weight_dtype == "default" and args.bf16_unet and not quantised)
    if asked and load_device.type == "cpu" and multiplies_in_bf16(load_device):
        cast, note = None if chosen == torch.bfloat16 else torch.bfloat16, IN_BF16
        tell(note)
    if weight_dtype == FP16_FAST:
        note = IN_FP16_SUMS
        tell(note)
    host_config.set_inference_dtype(chosen, cast, device=load_device)
    return note


def _keeps(device: torch.device, stored: torch.dtype, chosen: torch.dtype) -> bool:
    """Whether weights keep the dtype of the file rather than the one that the host chose.

    Not where the device does not have it (fp8 on a Mac), nor float32 where the host chose 16 bits: twice the
    memory would give no other numbers.
    """
    has_it = comfy.model_management.supports_cast(device, stored)
    return has_it and stored.itemsize <= chosen.itemsize and stored != chosen


class _Safetensors:
    """A safetensors file, or one of the release's pickles.

    Attributes:
        detected: tensors under Wan's own names, for the host's detection.
        shapes: the same with the shapes of the numbers that packed ones stand for.
        metadata: the file's, by key.
        formats: of the host's quantised layers, by layer.
        dtype: of its weights, before any were quantised here; None for a file that is quantised.
        built_on: device the model is built on; None is the host's choice.
    """

    def __init__(self, path: Path, weight_dtype: str):
        state_dict, metadata = read_checkpoint(path)
        self.detected, self.metadata = with_formats(files.to_wan_dit_keys(state_dict), metadata)
        files.refuse_loose_scales(self.detected)
        self.formats = quantised_layers(self.detected)
        self.dtype = None if self.formats else comfy.utils.weight_dtype(self.detected)
        check_scales(self.detected, self.formats)
        self.shapes = unpacked_shapes(self.detected, self.formats)
        self.weight_dtype = weight_dtype
        # The host's quantised layers load onto the device they were built on, so meta would not do.
        self.built_on = None if self.formats else torch.device("meta")

    def leave_out(self, key: str) -> None:
        """Forgets a tensor that the model has no place for."""
        self.detected.pop(key)
        self.shapes.pop(key)

    def quantise(self) -> None:
        """Makes it as a file of 8 bits would be, where `weight_dtype` asks for that."""
        if self.weight_dtype in EIGHT_BITS:
            self.detected = quantised(self.detected, self.weight_dtype)
            self.formats, self.built_on = quantised_layers(self.detected), None

    def operations(self, load_device: torch.device) -> type | None:
        """The classes of the layers; None for those the host has for its quantised formats."""
        tell_unpacked(set(self.formats.values()), load_device)
        if self.weight_dtype == FP8_FAST:
            return fp8_operations(load_device)
        # The time embedding is float32 whatever the weights are, so layers must cast.
        return None if self.formats else casting_operations(load_device)

    def stored(self, host_config: BASE) -> dict[str, torch.dtype]:
        """Dtypes by key of weights that stay as they are in the file; empty where another was chosen."""
        asked = self.weight_dtype != "default" or bool(self.formats)
        if asked or host_config.unet_config["dtype"] != comfy.utils.weight_dtype(self.detected):
            return {}
        return {k: v.dtype for k, v in self.detected.items() if not files.is_quantization_key(k)}

    def fill(self, model: Wan21, patcher: ModelPatcher) -> None:
        """Gives the model its weights, each in the dtype of its parameter."""
        quantised, dynamic = bool(self.formats), patcher.is_dynamic()
        # Dynamic memory converts at each use, but the host's fp8 product asks for weight.dtype before that.
        if not quantised and (self.weight_dtype == FP8_FAST or not dynamic):
            convert(model.diffusion_model, self.detected, is_mapped(patcher.load_device))
        model.load_model_weights(self.detected, "", assign=not quantised or dynamic)
        for name, part in model.diffusion_model.named_children():
            if name != "blocks":
                multiply_exactly(part)
        unpacked = unpacked_formats(set(self.formats.values()), patcher.load_device)
        multiply_exactly(model.diffusion_model.blocks, unpacked)
        if self.weight_dtype == FP8_ROWS:
            multiply_by_rows(model.diffusion_model.blocks)


def is_mapped(load_device: torch.device) -> bool:
    """Whether weights may stay mapped from the file while the model is there.

    On a CPU they are read where they lie. Pages are copied when written to, so no patch reaches the file, and
    a file that is deleted or replaced under its name stays readable; one that is cut short in place does
    not, and Windows refuses to delete it. For another device they are copied once, because the host pins
    what it streams and moves the rest; with --disable-mmap as well.
    """
    return comfy.model_management.is_device_cpu(load_device) and not comfy.utils.DISABLE_MMAP


def convert(dit: nn.Module, state_dict: dict[str, Tensor], mapped: bool) -> None:
    """Gives each tensor the dtype of its parameter, one after the other, in the state dict itself."""
    for key, value in state_dict.items():
        owner, _, name = key.rpartition(".")
        state_dict[key] = value.to(kept_dtype(dit.get_submodule(owner), name), copy=not mapped)


class _GGUFFile:
    """A GGUF file: matrices stay packed and are unpacked at each use. Attributes as of `_Safetensors`."""

    built_on = torch.device("meta")
    formats: Mapping[str, str] = MappingProxyType({})

    def __init__(self, path: Path, weight_dtype: str):
        if weight_dtype != "default":
            raise Refusal(
                f"weight_dtype is {weight_dtype}, and GGUF weights stay packed as they are",
                "Set weight_dtype to default",
            )
        self.metadata: dict[str, str] = {}
        packed = read_gguf(path)
        named = {key: torch.empty(p.shape, device="meta") for key, p in packed.items()}
        by_tensor = {id(named[key]): packed[key] for key in packed}
        self.detected = self.shapes = files.to_wan_dit_keys(named)
        self.packed = {key: by_tensor[id(tensor)] for key, tensor in self.shapes.items()}
        self.dtype = comfy.utils.weight_dtype(self.detected)

    def leave_out(self, key: str) -> None:
        """As of `_Safetensors`."""
        self.detected.pop(key)
        self.packed.pop(key)

    def quantise(self) -> None:
        """Nothing to do: another `weight_dtype` was refused."""

    def operations(self, load_device: torch.device) -> type:
        """The classes of layers that hold packed matrices."""
        return GGUFOperations

    def stored(self, host_config: BASE) -> dict[str, torch.dtype]:
        """Empty: what is not packed has the dtype chosen for all."""
        return {}

    def fill(self, model: Wan21, patcher: ModelPatcher) -> None:
        """Gives the model its weights: matrices packed, the rest in the dtype of its parameter.

        For a device other than the CPU packed ones are copied into memory, from where it fetches them fast.
        Matrices of types that only the gguf package unpacks are unpacked here, once.
        """
        copy = not comfy.model_management.is_device_cpu(patcher.load_device)
        foreign = sorted({weight.kind for weight in self.packed.values()} - BLOCKS.keys())
        if foreign:
            tell(
                f"{', '.join(foreign)} weights are unpacked while loading: they do not stay packed in memory"
            )
        layers = dict(model.diffusion_model.named_modules())
        for key, weight in self.packed.items():
            owner, _, name = key.rpartition(".")
            layer = layers[owner]
            stays_packed = weight.kind in BLOCKS and weight.kind not in PLAIN
            if isinstance(layer, GGUFOperations.Linear) and name == "weight" and stays_packed:
                layer.packed = (weight.kind, weight.shape)
                value = weight.data.clone() if copy else weight.data
            else:
                value = dequantize(*weight, kept_dtype(layer, name))
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
