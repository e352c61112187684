"""A fair queue for slots: first come first served, with bounds on how many wait and for how long."""

import asyncio
from collections import deque


class Overloaded(Exception):
    """The queue is full, or the wait was too long."""


class Closed(Exception):
    """The sandbox was closed while a call waited."""


class Queue:
    """`slots` slots for which at most `max_waiting` callers wait, each at most `wait_s` seconds.

    A slot that becomes free is handed to the one who waits longest, so nobody can overtake.
    """

    def __init__(self, slots: int, max_waiting: int, wait_s: float) -> None:
        self.slots = slots
        self.busy = 0
        """Slots that are taken."""
        self._max_waiting, self._wait_s = max_waiting, wait_s
        self._turns: deque[asyncio.Future[None]] = deque()

    @property
    def waiting(self) -> int:
        """Callers in the queue."""
        return len(self._turns)

    async def acquire(self) -> None:
        """Take a slot. Raises Overloaded or Closed."""
        if self.busy < self.slots:
            self.busy += 1
            return
        if self.waiting >= self._max_waiting:
            raise Overloaded(f"overloaded: {self.waiting} calls already wait for {self.slots} slots")
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append(turn)
        try:
            async with asyncio.timeout(self._wait_s):
                await turn
        except TimeoutError:
            self._leave(turn)
            raise Overloaded(f"overloaded: no slot of {self.slots} became free in {self._wait_s:g} s") from None
        except asyncio.CancelledError:
            self._leave(turn)
            raise

    def _leave(self, turn: asyncio.Future[None]) -> None:
        if turn in self._turns:
            self._turns.remove(turn)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            self.release()  # given up between being handed the slot and waking up

    def release(self) -> None:
        """Give a slot back."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.busy -= 1

    def close(self) -> None:
        """Send everybody away who waits."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_exception(Closed())
