"""Whether a layer still does what its class says."""

from torch import nn


def is_changed(layer: nn.Module) -> bool:
    """Whether somebody put another forward or hooks on a layer: it is then called, whatever that costs."""
    return bool("forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks)
