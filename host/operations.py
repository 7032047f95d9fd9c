"""Layers for our DiT: the host's with our own product on the CPU, or with matrices packed as in a GGUF."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import comfy.model_management
import comfy.ops
import torch
from torch import Tensor

from ..wan.files.gguf import dequantize
from ..wan.linear_cpu import linear
from ..wan.refusal import Refusal
from .products import with_additions


class _Lends(comfy.ops.CastWeightBiasOp):
    """A layer of the host's whose numbers may be used outside it."""

    @contextmanager
    def lend(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Weight and bias as its forward uses them on x: fetched, cast, with the host's patches."""
        weight, bias, stream = comfy.ops.cast_bias_weight(self, x, offloadable=True)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)


def lending(operations: ModuleType | type) -> ModuleType | type:
    """The host's layers: those which cast their numbers and no more lend them to `wan`, and those that
    multiply in 8 bits let others add to their products."""
    plain = comfy.ops.disable_weight_init
    if not isinstance(operations, type) or not issubclass(operations, plain):
        return operations
    layers = {}
    for name in ("LayerNorm", "RMSNorm", "Linear", "Conv2d", "Conv3d"):
        layer, casting = getattr(operations, name), "forward_comfy_cast_weights"
        if getattr(layer, casting, None) is getattr(getattr(plain, name), casting):
            layers[name] = type(name, (_Lends, layer), {})
    if linear := with_additions(operations.Linear):
        layers["Linear"] = linear
    return type(operations.__name__, (operations,), layers)


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
            kept, kept_bias, stream = self._fetch(input.device)
            weight, bias = kept, kept_bias
            if self.packed and weight.dtype == torch.uint8:
                weight = dequantize(weight, *self.packed, input.dtype)
            weight = weight.to(input.dtype)
            for function in self.weight_function:
                weight = function(weight)
            if bias is not None:
                bias = bias.to(input.dtype)
                for function in self.bias_function:
                    bias = function(bias)
            y = linear(input, weight, bias)
            comfy.ops.uncast_bias_weight(self, weight, bias, (stream, kept, kept_bias))
            return y

        def _fetch(self, device: torch.device) -> tuple[Tensor, Tensor | None, Any]:
            """Weight and bias as they are kept, on the device; the stream that copies them, if one does.

            As the host's layers do: the copy runs beside what the device still computes.
            """
            management = comfy.model_management
            weight, bias = self.weight, self.bias
            is_away = weight.device != device or (bias is not None and bias.device != device)
            stream = management.get_offload_stream(device) if is_away else None
            at_once = management.device_supports_non_blocking(device)
            weight = management.cast_to(weight, None, device, at_once, stream=stream)
            if bias is not None:
                copy = bool(self.bias_function)
                bias = management.cast_to(bias, None, device, at_once, copy=copy, stream=stream)
            management.sync_stream(device, stream)
            return weight, bias, stream

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
