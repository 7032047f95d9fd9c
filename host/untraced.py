"""What torch.compile leaves to Python."""

from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable)


class _Untraced(Protocol):
    def __call__(self, function: Function) -> Function: ...


# torch.compile compiles what is computed (the embeddings, one block for all, the head). The walk between them
# is the host's and the options' Python, which reads transformer_options: TorchCompileModel drops every guard
# on those, so traced code would never see a change in them. A partial: a function of ours would be traced.
untraced = cast(_Untraced, partial(torch.compiler.disable, recursive=False))
# The same for all that a function calls.
untraced_below = cast(_Untraced, torch.compiler.disable)
