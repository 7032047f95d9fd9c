"""Which kernels of our own a MODEL runs on, for the report."""

from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..wan import fp8_rows
from ..wan.changed import lent
from ..wan.glue import kernel_choices
from ..wan.kernels import Choice, describe
from .devices import devices_of

PACKED = "the feed-forward's matrices are packed, in 8 bits or changed"


def kernels_of(model: ModelPatcher) -> str | None:
    """Which kernels a MODEL of ours takes on its GPUs, and why not others; None where it runs on none.

    They are tried here for the first time, before the model takes room.
    """
    devices = [device for device in devices_of(model) if device.type == "cuda"]
    if not devices:
        return None
    by_rows = any(getattr(layer, "by_rows", False) for layer in model.model.diffusion_model.modules())
    if TORCH_COMPILE_KWARGS in model.model_options:
        said = "none of our own: the MODEL is compiled, and the compiler makes them"
        return f"{said}; weights of fp8_e4m3fn_rows are unpacked then at each use" if by_rows else said
    dit, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
    config = dit.config
    rides = any(lent(block.ffn[0], block.modulation.new_empty(0)) for block in dit.blocks)
    said = {}
    for device in devices:
        choices = kernel_choices(device, dtype, config.dim, config.head_dim)
        if not rides and choices["gelu_product"].function:
            choices["gelu_product"] = Choice(None, PACKED)
        if by_rows:
            choices |= fp8_rows.choices(device, dtype, config.ffn_dim)
        said[str(device)] = describe(choices)
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return "; ".join(f"on {device} {sentence}" for device, sentence in said.items())
