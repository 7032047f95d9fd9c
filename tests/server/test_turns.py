"""Turns go round among owners."""

import asyncio

from wan21.server.turns import Turns


async def work(turns, owner, seen):
    """One turn, noted."""
    async with turns.turn(owner):
        seen.append(owner)
        await asyncio.sleep(0)


def test_an_owner_with_one_comes_second_behind_one_with_many():
    seen = []

    async def main():
        turns = Turns()
        await asyncio.gather(*(work(turns, owner, seen) for owner in "AAAAAABBC"))
        await asyncio.wait_for(work(turns, "D", seen), 5)

    asyncio.run(main())
    assert "".join(seen) == "AABCABAAA" + "D"


def test_who_gives_up_passes_the_turn_on():
    seen = []

    async def main():
        turns = Turns()
        tasks = [asyncio.create_task(work(turns, owner, seen)) for owner in "ABCD"]
        await asyncio.sleep(0)
        tasks[1].cancel()
        await asyncio.sleep(0)
        tasks[2].cancel()  # at the moment in which it may just have got its turn
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.wait_for(work(turns, "E", seen), 5)

    asyncio.run(main())
    assert seen[0] == "A" and seen[-2:] == ["D", "E"] and "B" not in seen
