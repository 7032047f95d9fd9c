"""The host's layers that multiply in 8 bits, with what may be added beside such a product."""

from collections.abc import Callable, Sequence
from typing import Any

import comfy.ops
import torch.nn.functional as F
from comfy.quant_ops import QuantizedTensor
from torch import Tensor, nn

from ..wan.inplace import may_overwrite

Addition = Callable[[Tensor, Tensor], Tensor]


class EightBits:
    """A layer of the host's whose product is in 8 bits where its device has that.

    Attributes:
        beside: what is added to its result y, in order: (x, y) -> y, which may be changed in place.
    """

    beside: Sequence[Addition] = ()

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().forward(input, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        for add in self.beside:
            y = add(input, y)
        return y


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
