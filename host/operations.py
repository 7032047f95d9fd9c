"""Layers for our DiT: the host's with our own product on the CPU, or with matrices packed as in a GGUF."""

from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..wan.files.gguf import dequantize
from ..wan.linear_cpu import linear
from ..wan.refusal import Refusal


class CpuOperations(comfy.ops.manual_cast):
    """The host's layers that cast at each call, with our matrix product."""

    class Linear(comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight, bias, stream = comfy.ops.cast_bias_weight(self, input, offloadable=True)
            y = linear(input, weight, bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)
            return y


class GGUFOperations(comfy.ops.manual_cast):
    """The host's layers that cast at each call; matrices stay packed and are unpacked at each use."""

    class Linear(comfy.ops.manual_cast.Linear):
        packed: tuple[str, tuple[int, ...]] | None = None  # (kind, shape) while `weight` holds a file's bytes

        def forward_comfy_cast_weights(self, input: Tensor) -> Tensor:
            weight = comfy.model_management.cast_to(self.weight, None, input.device)
            if self.packed and weight.dtype == torch.uint8:
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

        # The host merges patches of other LoRA loaders through these two; a patched matrix stays unpacked.
        def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
            return dequantize(weight.to(torch.uint8), *self.packed) if self.packed else weight

        def set_weight(
            self,
            weight: Tensor,
            inplace_update: bool = False,
            seed: int | None = None,
            return_weight: bool = False,
            **kwargs: Any,
        ) -> Tensor | None:
            if inplace_update and self.packed:  # hooks write into the weight that is there
                raise Refusal(
                    "hooks carry a LoRA, and a GGUF model's packed weights cannot be changed in place",
                    "Remove the hooks and use Wan21LoraLoader with a strength_schedule, or load a "
                    "safetensors file",
                )
            assert self.bias is not None  # each of Wan's matrices has one, in the dtype of what is not packed
            weight = weight.to(self.bias.dtype)
            if return_weight:
                return weight
            self.weight = torch.nn.Parameter(weight, requires_grad=False)


def casting_operations(device: torch.device) -> type:
    """Layers that cast their weights to the dtype of their input at each call."""
    on_cpu = comfy.model_management.is_device_cpu(device)
    return CpuOperations if on_cpu else comfy.ops.manual_cast


def fp8_operations(device: torch.device) -> type:
    """The host's layers that multiply in fp8.

    Raises:
        Refusal: the device cannot.
    """
    if not comfy.model_management.supports_fp8_compute(device):
        name = comfy.model_management.get_torch_device_name(device)
        raise Refusal(
            f"weight_dtype is fp8_e4m3fn_fast, and {name} cannot multiply in fp8 (that takes an NVIDIA GPU "
            "of compute capability 8.9 or newer: RTX 40, L4, H100)",
            "Set fp8_e4m3fn, which stores in fp8 and computes in higher precision",
        )
    return comfy.ops.fp8_ops
