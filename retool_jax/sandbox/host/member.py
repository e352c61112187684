"""A worker as its crew sees it: requests, answers, and what happened to a worker that does not answer."""

import asyncio
import json
import re
import struct
import time

from retool_jax.sandbox.host.request import Request, UnreadableResponse, to_result
from retool_jax.sandbox.launch.worker import Worker
from retool_jax.sandbox.types import ToolResult

OVERTIME_S = 10.0  # beyond a program's time limit before its worker counts as hung
COLD_S = 30.0  # added if it first has to start the fork server: `START_S` of inside/supervisor.py
LATE_S = 1.0  # a hang noticed so much too late cannot be judged: this process itself stood still
MAX_FRAME_BYTES = 96 << 20
CRASH = re.compile(r'File ".*", line \d+')  # a traceback in the last output of a worker


class WorkerFault(Exception):
    """A worker is lost, and `kind` says how.

    "start": it did not start. "died", "hung", "nonsense": it died, did not answer, or answered nonsense. "crashed": the
    supervisor failed, not the program that it ran. "killed", "stopped": somebody outside did that. "overrun", "broken":
    the program that it ran did that (see `Worker.why_hung` and `Worker.why_dead`). "closed": the sandbox was closed.
    "probe": it failed a test while idle.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Member:
    """A launched worker, with what the crew knows about it."""

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
        """Whether its output has ended; sends nothing to the worker."""
        return self.launched.reader.at_eof()

    async def exchange(self, payload: bytes, timeout_s: float | None) -> dict:
        """Send a request (nothing if it is empty) and wait for the next frame. Raises WorkerFault."""
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
        """Run a program; returns the result and the raw response. Raises WorkerFault."""
        self.calls += 1
        self.tier = request.tier
        if request.op == "run" or self.calls == 1:  # later cells of a session do not reset what earlier ones caused
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
                    await asyncio.wait([asking], timeout=LATE_S)  # an answer may have come that is not read yet
                else:
                    reason = await self._why_hung(asking)
                if not asking.done():
                    raise WorkerFault(reason, f"the worker did not answer within {timeout_s:g} s")
            response = await asking
            return to_result(response), response
        except UnreadableResponse as error:
            raise WorkerFault("nonsense", f"the worker answered nonsense: {error}") from None
        finally:
            asking.cancel()

    async def _why_hung(self, asking: asyncio.Task[dict]) -> str:
        """`Worker.why_hung`; empty if the answer comes meanwhile."""
        looking = asyncio.create_task(self.launched.why_hung())
        try:
            await asyncio.wait([asking, looking], return_when=asyncio.FIRST_COMPLETED)
            return "" if asking.done() else looking.result()
        finally:
            looking.cancel()
