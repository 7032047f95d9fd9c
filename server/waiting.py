"""Waits with a time limit inside of loops that somebody may cancel."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when it takes longer.

    Before Python 3.12, `asyncio.wait_for` drops a cancel that arrives in the same pass of the event loop as
    the result; a loop around it then runs for ever. `asyncio.wait` does not.

    Raises:
        TimeoutError: the time is over.
    """
    task = asyncio.ensure_future(work)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds)
        if not done:
            raise TimeoutError(f"not done within {seconds} s")
        return task.result()
    finally:
        task.cancel()
