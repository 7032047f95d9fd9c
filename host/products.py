"""The host's layers that multiply in 8 bits, with what may be added beside such a product."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F
from comfy import quant_ops
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..wan.fp8_rows import product_of, quantised_rows
from ..wan.inplace import may_overwrite
from ..wan.memory import EXACT, Beside

Addition = Callable[[Tensor, Tensor], Tensor]


class EightBits:
    """A layer of the host's whose product is in 8 bits where its device has that.

    Attributes:
        beside: what is added to its result y, in order: (x, y) -> y, which may be changed in place.
        by_rows: of one in fp8, whether its input has a scale for each row; the host's has 1 for all.
    """

    beside: Sequence[Addition] = ()
    by_rows: bool = False

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.by_rows and self._multiplies_in_8_bits():
            y = self._of_rows(input, False)
        else:
            y = super().forward(input, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for add in self.beside:
            y = add(input, y)
        return y

    def folds_gelu(self, device: torch.device) -> bool:
        """Whether `of_gelu` takes fewer passes over its input than GELU and then this layer."""
        if device.type != "cuda" or self.beside or torch.compiler.is_compiling():
            return False
        if not self._multiplies_in_8_bits():
            return False
        return self.by_rows or (self._is_int8() and has_fast_kernels(device))

    def of_gelu(self, x: Tensor) -> Tensor:
        """This layer on GELU(x), by tanh: in the kernel that rounds its input, the host's or ours."""
        if self.by_rows:
            return self._of_rows(x, True)
        comfy.ops.run_every_op()
        return comfy.ops.linear_input_act(self, x, "gelu_tanh")

    def _is_int8(self) -> bool:
        return getattr(getattr(self, "weight", None), "_layout_cls", None) == "TensorWiseINT8Layout"

    def _multiplies_in_8_bits(self) -> bool:
        layer: Any = self
        exact = (getattr(layer, name, False) for name in ("_full_precision_mm", "comfy_force_cast_weights"))
        return not (any(exact) or layer.weight_function or layer.bias_function)

    def _of_rows(self, x: Tensor, gelu: bool) -> Tensor:
        """The product in fp8 with a scale for each row of x [..., K]; exact where the device has none."""
        layer: Any = self
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(
            layer, dtype=layer.weight.dtype, device=x.device, bias_dtype=x.dtype, offloadable=True,
            compute_dtype=x.dtype, want_requant=True,
        )  # fmt: skip
        multiply = None
        if not torch.compiler.is_compiling():
            multiply = product_of(x.device, x.dtype, x.shape[-1], len(weight))
        if multiply and isinstance(weight, QuantizedTensor):
            tensors: Any = weight
            rows = quantised_rows(x.flatten(0, -2), gelu)
            y = multiply(*rows, tensors._qdata, tensors._params.scale, bias, x.dtype)
            y = y.unflatten(0, x.shape[:-1])
        else:
            exact: Any = weight.dequantize() if isinstance(weight, QuantizedTensor) else weight
            y = F.linear(F.gelu(x, approximate="tanh") if gelu else x, exact.to(x.dtype), bias)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return y


def has_fast_kernels(device: torch.device) -> bool:
    """Whether the host rounds to 8 bits in one pass: on NVIDIA GPUs, by a PyTorch for CUDA 13 or newer.

    Its other way makes copies of the input in the dtype to compute in.
    """
    return device.type == "cuda" and quant_ops._CK_AVAILABLE and quant_ops.ck.registry.is_available("cuda")


def beside_product(layer: Any, device: torch.device, itemsize: int) -> Beside:
    """What a layer's product takes on a device beside its input and result.

    Args:
        itemsize: e, bytes of a number in the compute dtype.
    """
    if layer is None or not takes_additions(layer) or not layer._multiplies_in_8_bits():
        return EXACT
    in_integers = getattr(layer, "quant_format", None) in ("int8_tensorwise", "convrot_w4a4")
    if layer.by_rows or isinstance(layer, comfy.ops.fp8_ops.Linear) or has_fast_kernels(device):
        # Before compute capability 8.0 the host's sums in int32 are a tensor of their own.
        apart = in_integers and torch.cuda.get_device_capability(device) < (8, 0)
        return Beside(1.0, 4.0 if apart else 0.0)
    # The input rotated, scaled and rounded; of integers the sums in int32, and these scaled in pieces.
    rotated = getattr(layer.weight._params, "convrot", in_integers)
    return Beside((2 if rotated else 1) * itemsize + 1, itemsize + 4 if in_integers else 0.0)


def with_additions(linear: type) -> type | None:
    """A class of the host's linear layers with `EightBits`; None for one that never multiplies so."""
    if issubclass(linear, comfy.ops.fp8_ops.Linear) or hasattr(linear, "_disabled_formats"):
        return type("Linear", (EightBits, linear), {})
    return None


def takes_additions(layer: nn.Module) -> bool:
    """Whether a layer's product may be in 8 bits, and a change of its weight would make it none."""
    weight = getattr(layer, "weight", None)
    in_8_bits = isinstance(weight, QuantizedTensor) or isinstance(layer, comfy.ops.fp8_ops.Linear)
    return isinstance(layer, EightBits) and in_8_bits


def add_low_rank(x: Tensor, y: Tensor, up: Tensor, down: Tensor, strength: Tensor) -> Tensor:
    """y + strength*up(down(x)), in place where that may be.

    Args:
        x: [..., I].
        y: [..., O].
        up, down: [O, r] and [r, I].
        strength: 0-D.
    """
    inner = F.linear(x, down.to(x)) * strength  # (..., r)
    rows, inner, up = y.flatten(0, -2), inner.flatten(0, -2).to(y.dtype), up.to(y).t()
    y_rows = rows.addmm_(inner, up) if may_overwrite() else rows.addmm(inner, up)
    return y_rows.unflatten(0, y.shape[:-1])


def multiply_by_rows(layers: nn.Module) -> None:
    """Gives the input of all layers in 8 bits a scale for each row."""
    for layer in layers.modules():
        if isinstance(layer, EightBits) and takes_additions(layer):
            layer.by_rows = True
