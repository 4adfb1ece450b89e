"""What requests hold together is bounded: by lanes of bytes, whoever asks, and small requests pass."""

import asyncio

import pytest

from supsupd.sections import ServingSettings
from supsupd.serving.memory import SMALL_BYTES, STAGES, TINY_BYTES, Memory, MemoryFull, TooLarge

MIB = 1 << 20


def memory(mib=64, **limits):
    """A budget of so many MiB, a quarter for each stage."""
    settings = ServingSettings(memory_bytes=mib * MIB, **limits)
    return Memory(lambda: settings)


def test_what_would_never_fit_is_refused_at_once_in_one_line():
    async def take():
        with memory().holding() as holding:
            await holding.take("received", 12 * MIB, "a body")
            await holding.take("received", 12 * MIB + 1, "a body")

    with pytest.raises(TooLarge, match=r"too_large: a body would take 13 MiB .* leaves 12 to one") as caught:
        asyncio.run(take())
    assert caught.value.status == 413


def test_what_does_not_fit_now_waits_and_is_refused_after_its_time():
    async def take():
        room = memory(query_seconds=0.05)
        with room.holding() as first, room.holding() as second:
            await first.take("decoded", 8 * MIB, "one")
            with pytest.raises(MemoryFull, match="overloaded") as caught:
                await second.take("decoded", 8 * MIB, "another")
            assert caught.value.status == 503
            waiting = asyncio.create_task(second.take("decoded", 8 * MIB, "another", 60))
            await asyncio.sleep(0)
            first.give("decoded")
            await waiting
        assert room.lanes["decoded"].used == 0

    asyncio.run(take())


def test_large_ones_never_take_the_room_of_small_ones():
    async def take():
        room = memory()
        holdings = [room.holding() for _ in range(6)]
        await holdings[0].take("received", 12 * MIB, "all that large ones may")
        late = asyncio.create_task(holdings[1].take("received", 2 * MIB, "one more"))
        await asyncio.sleep(0)
        for holding in holdings[2:]:
            await asyncio.wait_for(holding.take("received", SMALL_BYTES, "a small one"), 1)
        assert not late.done()
        holdings[0].end()
        await late
        for holding in holdings:
            holding.end()
        assert room.lanes["received"].used == 0

    asyncio.run(take())


def test_what_is_tiny_is_not_counted():
    async def take():
        room = memory()
        await room.holding().take("received", TINY_BYTES, "a row")
        assert room.lanes["received"].used == 0

    asyncio.run(take())


def test_who_left_while_waiting_holds_nothing_and_holds_up_nobody():
    async def take():
        room = memory()
        first, gone, last = (room.holding() for _ in range(3))
        await first.take("posted", 10 * MIB, "a batch")
        leaving = asyncio.create_task(gone.take("posted", 12 * MIB, "a batch"))
        waiting = asyncio.create_task(last.take("posted", 2 * MIB, "a batch"))
        await asyncio.sleep(0)
        assert not waiting.done()  # in its order
        leaving.cancel()
        await asyncio.wait_for(waiting, 1)
        first.end()
        last.end()
        assert room.lanes["posted"].used == 0

    asyncio.run(take())


def test_who_leaves_in_the_moment_of_its_turn_gives_it_back():
    async def take():
        room = memory()
        first, gone = room.holding(), room.holding()
        await first.take("answered", 12 * MIB, "an answer")
        leaving = asyncio.create_task(gone.take("answered", 12 * MIB, "an answer"))
        await asyncio.sleep(0)
        first.end()
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert room.lanes["answered"].used == 0

    asyncio.run(take())


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_room_of_its_own(stage):
    async def take():
        room = memory()
        for other in STAGES:
            if other != stage:
                await room.holding().take(other, 12 * MIB, "all of it")
        await asyncio.wait_for(room.holding().take(stage, 12 * MIB, "all of it"), 1)

    asyncio.run(take())


def test_a_new_limit_holds_for_what_comes_after():
    async def take():
        settings = [ServingSettings(memory_bytes=64 * MIB)]
        room = Memory(lambda: settings[0])
        await room.holding().take("received", 12 * MIB, "a body")
        settings[0] = ServingSettings(memory_bytes=16 * MIB)
        with pytest.raises(TooLarge):
            await room.holding().take("received", 4 * MIB, "a body")

    asyncio.run(take())
