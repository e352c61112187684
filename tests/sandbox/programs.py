"""Programs that several test files run, and how to wait for their effects."""

import asyncio
import time
from collections.abc import Callable

SLEEP = "import time\ntime.sleep(30)"
"""For a program that the test ends itself."""


def nap(seconds: float) -> str:
    """A program that prints "ok" so long after this call, whenever and however often it is begun.

    A test that kills its worker has all that time for it, and the next try is not as long again.
    """
    return f"import time\ntime.sleep(max({time.time() + seconds} - time.time(), 0))\nprint('ok')"


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Wait until a condition holds. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)
