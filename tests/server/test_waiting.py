"""A cancel is never lost, whatever happens beside it."""

import asyncio

import pytest
from wan21.server.waiting import within


@pytest.mark.parametrize("passes", range(4))
def test_a_cancel_beside_the_result_ends_the_loop_around_it(passes):
    async def follow(queue):
        while True:
            await within(5, queue.get())

    async def main():
        queue = asyncio.Queue()
        following = asyncio.ensure_future(follow(queue))
        await asyncio.sleep(0.01)
        queue.put_nowait("line")
        for _ in range(passes):
            await asyncio.sleep(0)
        following.cancel()
        done, _ = await asyncio.wait([following], timeout=1)
        assert done and following.cancelled()

    loop = asyncio.new_event_loop()  # not `asyncio.run`, which would wait for what goes on
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()


def test_time_that_is_over_loses_no_item():
    async def main():
        queue = asyncio.Queue()
        with pytest.raises(TimeoutError):
            await within(0.01, queue.get())
        queue.put_nowait("line")
        return await within(5, queue.get())

    assert asyncio.run(main()) == "line"


def test_an_error_comes_through():
    async def fail():
        raise KeyError("x")

    with pytest.raises(KeyError):
        asyncio.run(within(5, fail()))
