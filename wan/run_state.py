"""State of a run in a process that makes calls for another: what an option keeps from step to step.

An option's state is pickled as its key, and is made where the first call that needs it comes.
"""

from collections.abc import Callable
from typing import Any, TypeVar

State = TypeVar("State")

_states: dict[str, Any] = {}


def state_of(key: str, make: Callable[..., State], *args: Any) -> State:
    """The state of that key, made here by `make(*args)` if there is none."""
    if key not in _states:
        _states[key] = make(*args)
    return _states[key]


def forget_states() -> None:
    """Drops all of them: a run has ended, or who shares its tokens has changed."""
    _states.clear()
