"""A worker as its crew sees it: talking to it, and what became of it if it does not answer."""

import asyncio
import json
import re
import struct
import time

from retool_jax.sandbox.host.request import Nonsense, Request, to_result
from retool_jax.sandbox.launch.worker import Worker
from retool_jax.sandbox.types import ToolResult

OVERTIME_S = 10.0  # what a worker gets beyond a program's own time limit before it counts as hung
COLD_S = 30.0  # and beyond that where it first has to start the fork server: `START_S` of inside/supervisor.py
LATE_S = 1.0  # where a hang is noticed so much too late, this process has stood still itself, and cannot judge it
MAX_FRAME_BYTES = 96 << 20
CRASH = re.compile(r'File ".*", line \d+')  # a traceback among a worker's last words


class WorkerFault(Exception):
    """A worker is lost, and `kind` says how.

    It did not start ("start"), "died", "hung", answered "nonsense", "crashed", which is a fault of the program inside
    and not of what it ran, or was "killed" or "stopped" from outside. Two kinds are the doing of what it ran: "overrun"
    and "broken" (see `Worker.why_hung` and `Worker.why_dead`).
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Member:
    """A launched worker, with what the crew knows of it."""

    def __init__(self, launched: Worker, memory_mb: int, core: int | None = None) -> None:
        self.launched = launched
        self.memory_mb = memory_mb
        self.core = core
        self.born = self.idle_since = time.monotonic()
        self.calls = 0
        self.tier = "base"  # the fork server of its last program
        self.tiers: set[str] = {"base"}  # fork servers that run in it
        self.heavy_since: float | None = None

    @property
    def dead(self) -> bool:
        """Whether its output has ended (noticed without asking it anything)."""
        return self.launched.reader.at_eof()

    async def exchange(self, payload: bytes, timeout_s: float | None) -> dict:
        """Send a request (none if empty) and wait for the next frame. Raises WorkerFault."""
        reader, writer = self.launched.reader, self.launched.writer
        try:
            async with asyncio.timeout(timeout_s):
                if payload:
                    writer.write(struct.pack(">I", len(payload)) + payload)
                    await writer.drain()
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                if size > MAX_FRAME_BYTES:
                    raise ValueError(f"a frame of {size} bytes")
                message = json.loads(await reader.readexactly(size))
                if not isinstance(message, dict):
                    raise ValueError(f"a frame that is a {type(message).__name__}")
                return message
        except TimeoutError:
            raise WorkerFault("hung", f"the worker did not answer within {timeout_s:g} s") from None
        except (asyncio.IncompleteReadError, ConnectionError):
            words = await self.launched.last_words()
            kind = "crashed" if CRASH.search(words) else await self.launched.why_dead()
            raise WorkerFault(kind, f"the worker died: {words or 'no last words'}") from None
        except ValueError as error:
            raise WorkerFault("nonsense", f"the worker answered nonsense: {error}") from None

    async def perform(self, request: Request) -> tuple[ToolResult, dict]:
        """Run a program. Returns the result and the response that it was read from. Raises WorkerFault."""
        self.calls += 1
        self.tier = request.tier
        if request.op == "run" or self.calls == 1:  # all that ever ran in a session's worker is that session's doing
            self.launched.begin_call()
        timeout_s = request.limits.wall_s + OVERTIME_S + (0.0 if request.tier in self.tiers else COLD_S)
        self.tiers.add(request.tier)
        begun = time.monotonic()
        asking = asyncio.create_task(self.exchange(request.frame, None))
        try:
            await asyncio.wait([asking], timeout=timeout_s)
            if not asking.done():
                if time.monotonic() - begun > timeout_s + LATE_S:
                    reason = "hung"
                    await asyncio.wait([asking], timeout=LATE_S)  # what has come meanwhile is not read yet
                else:
                    reason = await self._why_hung(asking)
                if not asking.done():
                    raise WorkerFault(reason, f"the worker did not answer within {timeout_s:g} s")
            response = await asking
            return to_result(response), response
        except Nonsense as error:
            raise WorkerFault("nonsense", f"the worker answered nonsense: {error}") from None
        finally:
            asking.cancel()

    async def _why_hung(self, asking: asyncio.Task[dict]) -> str:
        """`Worker.why_hung`, unless the answer comes while it looks; then this says nothing."""
        looking = asyncio.create_task(self.launched.why_hung())
        try:
            await asyncio.wait([asking, looking], return_when=asyncio.FIRST_COMPLETED)
            return "" if asking.done() else looking.result()
        finally:
            looking.cancel()
