"""Whether a layer still does what its class says, and the numbers by which it does it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

PLAIN = (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Conv2d, nn.Conv3d)


def is_changed(layer: nn.Module) -> bool:
    """Whether somebody put another forward or hooks on a layer: it is then called, whatever that costs."""
    return bool("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks)


def lent(layer: nn.Module, x: Tensor) -> AbstractContextManager[tuple[Tensor, Any]] | None:
    """Weight and bias of a layer as it uses them on x; None where it does something of its own.

    Only an RMSNorm may have None for its bias.

    A host's layer that casts, patches or fetches them has a method `lend` for that.
    """
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    if is_changed(layer) or weight is None or (bias is None and not isinstance(layer, nn.RMSNorm)):
        return None
    if lend := getattr(layer, "lend", None):
        return lend(x)
    return nullcontext((weight, bias)) if type(layer) in PLAIN else None
