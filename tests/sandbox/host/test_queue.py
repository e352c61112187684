"""The queue: order, limits, and no slot is lost when callers give up."""

import asyncio

import pytest

from retool_jax.sandbox.host.queue import Closed, Overloaded, Queue


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_first_come_first_served_and_nobody_overtakes():
    async def main() -> list[str]:
        queue, order = Queue(1, 10, 60), []

        async def caller(name: str) -> None:
            await queue.acquire()
            order.append(name)
            await asyncio.sleep(0)
            queue.release()

        await queue.acquire()
        calls = [asyncio.create_task(caller(name)) for name in "abc"]
        await settle()
        queue.release()
        late = asyncio.create_task(caller("late"))  # arrives while the slot is being handed to a
        await asyncio.gather(*calls, late)
        assert (queue.busy, queue.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == ["a", "b", "c", "late"]


def test_queue_is_bounded_in_length_and_in_time():
    async def main() -> None:
        queue = Queue(1, 1, 0.05)
        await queue.acquire()
        waiting = asyncio.create_task(queue.acquire())
        await settle()
        with pytest.raises(Overloaded, match="1 calls already wait for 1 slots"):
            await queue.acquire()
        with pytest.raises(Overloaded, match=r"no slot of 1 became free in 0\.05 s"):
            await waiting
        assert (queue.busy, queue.waiting) == (1, 0)

    asyncio.run(main())


def test_a_slot_is_not_lost_when_its_new_owner_was_cancelled():
    async def main() -> None:
        queue = Queue(1, 10, 60)
        await queue.acquire()
        first, second = (asyncio.create_task(queue.acquire()) for _ in range(2))
        await settle()
        queue.release()  # handed to `first`, which is cancelled before it wakes
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first
        queue.release()
        assert queue.busy == 0
        waiting = asyncio.create_task(queue.acquire())
        await waiting
        gone = asyncio.create_task(queue.acquire())
        await settle()
        gone.cancel()
        await settle()
        assert queue.waiting == 0

    asyncio.run(main())


def test_closing_sends_everybody_away():
    async def main() -> None:
        queue = Queue(1, 10, 60)
        await queue.acquire()
        waiting = asyncio.create_task(queue.acquire())
        await settle()
        queue.close()
        with pytest.raises(Closed):
            await waiting

    asyncio.run(main())
