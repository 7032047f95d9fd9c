"""The one rule on which a result is written over its input."""

import torch


def may_overwrite() -> bool:
    """Whether a tensor of this call may be changed in place: no gradient needs its old value."""
    return not torch.is_grad_enabled()
