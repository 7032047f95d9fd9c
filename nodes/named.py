"""The one place where the name of a node is put before what it says."""

from collections.abc import Callable
from functools import wraps

from .. import host
from ..wan.refusal import Refusal
from .kept_latent import LatentKept


def named(node: str) -> Callable[[Callable], Callable]:
    """Decorates `execute` of a node: its name stands before its refusals and before what it tells the log."""

    def decorate(execute):
        @wraps(execute)
        def run(cls, *args, **kwargs):
            with host.speaking_as(node):
                try:
                    return execute(cls, *args, **kwargs)
                except (Refusal, LatentKept) as error:
                    raise error.about(node) from error

        return run

    return decorate
