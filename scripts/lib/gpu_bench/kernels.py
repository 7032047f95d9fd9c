"""The one place that knows how our kernels are switched (`wan/glue.py`, `wan/kernels/`)."""

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .bench import Bench, Missing

NONE = "no kernels in this tree"


def glue() -> Any:
    """The module with the work between the products, where this tree has kernels for it.

    Raises:
        Missing: it has none.
    """
    for name in ("wan21.wan.kernels", "wan21.wan.glue"):
        try:
            module = importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise Missing(NONE) from error
    return module


_eager_choices: dict = {}


@contextmanager
def eager() -> Iterator[None]:
    """PyTorch's own operations in place of our kernels, in a tree that has any."""
    try:
        glue()
    except Missing:
        yield
        return
    kernels: Any = importlib.import_module("wan21.wan.kernels")
    # What was decided for a device stays decided for the process; here each way has decisions of its own.
    switch, choices = os.environ.get(kernels.SWITCH), kernels._chosen
    os.environ[kernels.SWITCH], kernels._chosen = "0", _eager_choices
    try:
        yield
    finally:
        os.environ.pop(kernels.SWITCH)
        if switch is not None:
            os.environ[kernels.SWITCH] = switch
        kernels._chosen = choices


def in_eager(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """The call without our kernels."""

    def run():
        with eager():
            return call(*args, **kwargs)

    return run


def check_taken(bench: Bench) -> str:
    """What is said of the kernels that are taken here.

    Raises:
        Missing: none is, and why.
    """
    module = glue()
    config = bench.size.config
    choices = module.kernel_choices(bench.device, bench.dtype, config.dim, config.head_dim)
    said = importlib.import_module("wan21.wan.kernels").describe(choices)
    if not any(choice.function for choice in choices.values()):
        raise Missing(said)
    return said
