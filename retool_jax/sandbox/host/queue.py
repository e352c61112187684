"""A fair queue for slots: first come, first served, with limits on how many wait and for how long."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Overloaded(Exception):
    """The queue is full, or the wait was too long."""


class Closed(Exception):
    """The sandbox was closed while a call waited."""


class Line(Generic[T]):
    """Callers that wait for a thing; the one that has waited longest gets the next.

    Args:
        give_back: takes a thing back if the caller that got it gave up before it woke up.
    """

    def __init__(self, give_back: Callable[[T], None]) -> None:
        self._give_back = give_back
        self._turns: deque[asyncio.Future[T]] = deque()

    def __len__(self) -> int:
        return len(self._turns)

    async def wait(self, wait_s: float | None = None) -> T:
        """The next thing for this caller. Raises TimeoutError, or the exception given to `send_away`."""
        turn: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout(wait_s):
                return await turn
        except (TimeoutError, asyncio.CancelledError):
            if turn in self._turns:
                self._turns.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._give_back(turn.result())
            raise

    def hand(self, thing: T) -> bool:
        """Give a thing to the caller that has waited longest; False if nobody waits."""
        if turn := self._first():
            turn.set_result(thing)
        return turn is not None

    def send_away(self, why: Exception) -> None:
        """Raise `why` in every waiting caller."""
        while turn := self._first():
            turn.set_exception(why)

    def _first(self) -> asyncio.Future[T] | None:
        """The first caller that still waits, taken off the line."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                return turn
        return None


class Queue:
    """`slots` slots for which at most `max_waiting` callers wait, each at most `wait_s` seconds.

    A free slot goes to the caller that has waited longest, so nobody can overtake.
    """

    def __init__(self, slots: int, max_waiting: int, wait_s: float) -> None:
        self.slots = slots
        self.busy = 0  # slots that are taken
        self._max_waiting, self._wait_s = max_waiting, wait_s
        self._line: Line[None] = Line(lambda _: self.release())

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._line)

    async def acquire(self) -> None:
        """Take a slot. Raises Overloaded or Closed."""
        if self.busy < self.slots:
            self.busy += 1
            return
        if self.waiting >= self._max_waiting:
            raise Overloaded(f"overloaded: {self.waiting} calls already wait for {self.slots} slots")
        try:
            await self._line.wait(self._wait_s)
        except TimeoutError:
            raise Overloaded(f"overloaded: no slot of {self.slots} became free in {self._wait_s:g} s") from None

    def release(self) -> None:
        """Give a slot back."""
        if not self._line.hand(None):
            self.busy -= 1

    def close(self) -> None:
        """Raise Closed in every waiting caller."""
        self._line.send_away(Closed())
