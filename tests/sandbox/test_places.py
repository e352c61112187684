"""The queue: order, bounds, and nothing lost when callers give up."""

import asyncio

import pytest

from retool_jax.sandbox.host.places import Closed, Overloaded, Places


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served_and_nobody_overtakes():
    async def main() -> list[str]:
        places, order = Places(1, 10, 60), []

        async def caller(name: str) -> None:
            await places.acquire()
            order.append(name)
            await asyncio.sleep(0)
            places.release()

        await places.acquire()
        calls = [asyncio.create_task(caller(name)) for name in "abc"]
        await settle()
        places.release()
        late = asyncio.create_task(caller("late"))  # comes while the place is being handed to a
        await asyncio.gather(*calls, late)
        assert (places.busy, places.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == ["a", "b", "c", "late"]


def test_queue_is_bounded_in_length_and_in_time():
    async def main() -> None:
        places = Places(1, 1, 0.05)
        await places.acquire()
        waiting = asyncio.create_task(places.acquire())
        await settle()
        with pytest.raises(Overloaded, match="1 calls already wait for 1 places"):
            await places.acquire()
        with pytest.raises(Overloaded, match=r"no place of 1 became free in 0\.05 s"):
            await waiting
        assert (places.busy, places.waiting) == (1, 0)

    asyncio.run(main())


def test_a_place_is_not_lost_when_its_new_owner_was_cancelled():
    async def main() -> None:
        places = Places(1, 10, 60)
        await places.acquire()
        first, second = (asyncio.create_task(places.acquire()) for _ in range(2))
        await settle()
        places.release()  # handed to `first`, which is cancelled before it wakes
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        places.release()
        assert places.busy == 0
        waiting = asyncio.create_task(places.acquire())
        await waiting
        gone = asyncio.create_task(places.acquire())
        await settle()
        gone.cancel()
        await settle()
        assert places.waiting == 0

    asyncio.run(main())


def test_closing_sends_everybody_away():
    async def main() -> None:
        places = Places(1, 10, 60)
        await places.acquire()
        waiting = asyncio.create_task(places.acquire())
        await settle()
        places.close()
        with pytest.raises(Closed):
            await waiting

    asyncio.run(main())
