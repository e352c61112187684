"""The workers that a sandbox keeps ready: started, tried, replaced, stopped."""

import asyncio
import json
import random
import re
import struct
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import replace
from types import ModuleType
from typing import Any

from retool_jax.errors import UserError
from retool_jax.sandbox.metrics import Metrics
from retool_jax.sandbox.request import Nonsense, Request, to_result
from retool_jax.sandbox.types import SandboxConfig, ToolResult

START_S = 60.0  # a cold start of the heavy fork servers on a loaded machine
PROBE_WALL_S = 5.0
OVERTIME_S = 3.0  # what a worker gets beyond a program's own time limit before it counts as hung
MAX_FRAME_BYTES = 96 << 20
BREAKER = 5  # starts that fail in a row before callers are told at once instead of waiting for the next one
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 10.0
MEMORY_CALLS = 50  # calls between two looks at a worker's memory
MEMORY_S = 1.0  # for how long it must hold too much: some kernels take their time to free what a program had
TEND_S = 1.0
WARM_S = 1.0  # idle time after which a worker starts fork servers ahead of need: a second of processor time, or two
CRASH = re.compile(r'File ".*", line \d+')  # a traceback among a worker's last words


class WorkerFault(Exception):
    """The machinery failed, and `kind` says how: a worker did not start ("start"), died, hung, answered nonsense, or
    "crashed", which is a fault of the program inside and not of what it ran."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def pause_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, and uneven so that not all come back at once."""
    return min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)


class Member:
    """A launched worker, with what the crew knows of it. `launched` is the back-end's own object."""

    def __init__(self, launched: Any, memory_mb: int) -> None:
        self.launched = launched
        self.memory_mb = memory_mb
        self.born = self.idle_since = time.monotonic()
        self.calls = 0
        self.tiers: set[str] = set()
        """Fork servers that have been asked for in it."""
        self.heavy_since: float | None = None

    @property
    def dead(self) -> bool:
        """Whether its output has ended (noticed without asking it anything)."""
        return self.launched.reader.at_eof()

    async def exchange(self, payload: bytes, timeout_s: float) -> dict:
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
            kind = "crashed" if CRASH.search(words) else "died"
            raise WorkerFault(kind, f"the worker died: {words or 'no last words'}") from None
        except ValueError as error:
            raise WorkerFault("nonsense", f"the worker answered nonsense: {error}") from None

    async def perform(self, request: Request) -> tuple[ToolResult, dict]:
        """Run a program. Returns the result and the response that it was read from. Raises WorkerFault."""
        self.calls += 1
        self.tiers.add(request.tier)
        self.launched.begin_call()
        response = await self.exchange(request.frame, request.limits.wall_s + OVERTIME_S)
        try:
            return to_result(response), response
        except Nonsense as error:
            raise WorkerFault("nonsense", f"the worker answered nonsense: {error}") from None


class Crew:
    """`config.places` workers and a spare, each replaced in the background when it is spent, sick or dead.

    A start that fails is tried again with growing pauses for as long as the crew is open. After `BREAKER` failures in
    a row `take` raises at once; the next start that succeeds ends that.
    """

    def __init__(self, module: ModuleType, config: SandboxConfig, metrics: Metrics) -> None:
        self.description = ""
        self._module, self._config, self._metrics = module, config, metrics
        self._ready: list[Member] = []
        self._lent: set[Member] = set()  # to calls that give them back
        self._own: set[Member] = set()  # to sessions and large calls, which do not
        self._waiting: deque[asyncio.Future[Member]] = deque()
        self._work: set[asyncio.Task] = set()  # starting and tending
        self._stops: set[asyncio.Task] = set()
        self._starting = self._probing = 0
        self._failures = 0
        self._last_fault = ""
        self._tiers: set[str] = set()  # fork servers that programs have asked for
        self._closed = False

    @property
    def ready(self) -> int:
        """Workers that wait for a call."""
        return len(self._ready)

    @property
    def broken(self) -> bool:
        """Whether no worker can be had for now."""
        return self._failures >= BREAKER and not self._ready and not self._lent

    async def open(self) -> None:
        """Start the first worker; the others follow. Raises WorkerFault if it does not start."""
        self._ready.append(await self.recruit(self._config.limits.memory_mb))
        self._refill()
        self._spawn(self._tend(), self._work)

    async def recruit(self, memory_mb: int) -> Member:
        """Start a worker for programs of up to `memory_mb`. Raises WorkerFault."""
        begun = time.monotonic()
        try:
            launched = await self._module.launch(self._config, memory_mb)
        except (OSError, UserError) as error:
            raise WorkerFault("start", f"no worker started: {error}") from None
        try:
            member = Member(launched, memory_mb)
            hello = await member.exchange(b"", START_S)
            self.description = self._module.describe(hello["isolation"])
        except (WorkerFault, KeyError) as fault:
            await launched.stop()
            raise WorkerFault("start", f"no worker started: {fault}") from None
        except BaseException:
            await launched.stop()
            raise
        if self._closed:
            await launched.stop()
            raise WorkerFault("closed", "the sandbox was closed")
        self._metrics.start_s.add(time.monotonic() - begun)
        return member

    async def take(self, memory_mb: int) -> Member:
        """A worker for one call; hand it to `give` or `drop` afterwards. Raises WorkerFault.

        A call that may use more memory than the others gets a worker of its own, so that theirs stay tight.
        """
        if memory_mb > self._config.limits.memory_mb:
            return await self.claim(memory_mb)
        while self._ready:  # the one used last is the warmest
            member = self._ready.pop()
            if not member.dead:
                self._lent.add(member)
                return member
            self._retire(member, "died idle")
        if self.broken:
            raise WorkerFault("start", f"{self._failures} starts in a row failed, the last one: {self._last_fault}")
        turn: asyncio.Future[Member] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._refill()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._lent.discard(turn.result())
                self._admit(turn.result())
            raise

    async def claim(self, memory_mb: int) -> Member:
        """A worker that does not come back; hand it to `drop` afterwards. Raises WorkerFault."""
        default = self._config.limits.memory_mb
        idle = [member for member in self._ready if not member.calls and not member.dead]
        # The spare may go, a worker that calls will ask for may not.
        if memory_mb <= default and idle and len(self._ready) + len(self._lent) > self._config.places:
            member = idle[0]
            self._ready.remove(member)
            self._refill()
        else:
            member = await self.recruit(max(memory_mb, default))
        self._own.add(member)
        return member

    def give(self, member: Member, response: dict) -> None:
        """Take a worker back after a call that it answered."""
        age = time.monotonic() - member.born
        self._tiers |= member.tiers
        if not response.get("clean"):  # something of the program could not be killed
            self.drop(member, "unclean")
        elif member in self._own:
            self.drop(member, "large call")
        elif member.calls >= self._config.recycle_calls:
            self.drop(member, "calls")
        elif age >= self._config.recycle_s:
            self.drop(member, "age")
        elif self._too_heavy(member):
            self.drop(member, "memory")
        else:
            self._lent.discard(member)
            self._admit(member)

    def _too_heavy(self, member: Member) -> bool:
        """Whether a worker holds too much memory, and has for a while."""
        if member.calls % MEMORY_CALLS and member.heavy_since is None:
            return False
        now = time.monotonic()
        if (member.launched.memory_mb() or 0) <= self._config.recycle_memory_mb:
            member.heavy_since = None
        elif member.heavy_since is None:
            member.heavy_since = now
        elif now - member.heavy_since >= MEMORY_S:
            return True
        return False

    def drop(self, member: Member, reason: str) -> None:
        """Give a worker up; it is stopped in the background and, unless it was a caller's own, replaced."""
        self._lent.discard(member)
        self._own.discard(member)
        self._retire(member, reason)

    def _admit(self, member: Member) -> None:
        """Hand a worker to the one who waits longest, or keep it ready."""
        if self._closed:
            return self._retire(member, "closed")
        member.idle_since = time.monotonic()
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self._lent.add(member)
                return turn.set_result(member)
        self._ready.append(member)

    def _retire(self, member: Member, reason: str) -> None:
        if not self._closed:
            self._metrics.restarts[reason] += 1
        self._spawn(member.launched.stop(), self._stops)
        self._refill()

    def _spawn(self, work: Coroutine[Any, Any, Any], tasks: set[asyncio.Task]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _refill(self) -> None:
        """Start what is missing; one at a time while starts fail."""
        if self._closed:
            return
        have = len(self._ready) + len(self._lent) + self._probing + self._starting
        missing = self._config.places + 1 - have
        if self._failures:
            missing = min(missing, 1 - self._starting)
        for _ in range(missing):
            self._starting += 1
            self._spawn(self._start(), self._work)

    async def _start(self) -> None:
        try:
            if self._failures:
                await asyncio.sleep(pause_s(self._failures))
            member = await self.recruit(self._config.limits.memory_mb)
        except WorkerFault as fault:
            self._metrics.faults[fault.kind] += 1
            self._failures += 1
            self._last_fault = str(fault)
            if self.broken:
                self._send_away(fault)
        else:
            self._failures = 0
            self._admit(member)
        finally:
            self._starting -= 1
            self._refill()

    def _send_away(self, fault: WorkerFault) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(fault)

    async def _tend(self) -> None:
        """Look after workers that nobody uses: replace those that died or grew old, start fork servers that they lack
        and programs ask for, and try those that were idle for long."""
        while True:
            await asyncio.sleep(TEND_S)
            now = time.monotonic()
            for member in tuple(self._ready):
                old, idle = now - member.born, now - member.idle_since
                cold = not self._tiers <= member.tiers and not self._waiting
                due = 0 < self._config.probe_s <= idle or (cold and idle >= WARM_S)
                if not member.dead and old < self._config.recycle_s and not due:
                    continue
                if member not in self._ready:  # taken while another one was tried
                    continue
                self._ready.remove(member)
                if member.dead or old >= self._config.recycle_s:
                    self._retire(member, "died idle" if member.dead else "age")
                else:
                    await self._probe(member)

    async def _warm(self, member: Member) -> None:
        """Have a worker start the fork servers that programs ask for; they load while it serves. Raises WorkerFault."""
        if cold := sorted(self._tiers - member.tiers):
            await member.exchange(json.dumps({"op": "warm", "tiers": cold}).encode(), PROBE_WALL_S)
            member.tiers.update(cold)

    async def _probe(self, member: Member) -> None:
        self._probing += 1
        cold = not self._tiers <= member.tiers
        limits = replace(self._config.limits, wall_s=PROBE_WALL_S)
        try:
            await self._warm(member)
            if not cold:
                result, response = await member.perform(Request("print(2 + 2)", limits=limits))
                if result.stdout != "4\n" or not response.get("clean"):
                    raise WorkerFault("probe", f"print(2 + 2) ended as {result.status}: {result.stdout[:80]!r}")
        except WorkerFault as fault:
            self._metrics.faults[fault.kind] += 1
            self._probing -= 1
            self._retire(member, "probe")
        except BaseException:  # closing
            self._probing -= 1
            self._retire(member, "closed")
            raise
        else:
            self._probing -= 1
            self._admit(member)

    async def close(self) -> None:
        """Stop every worker, those that run a program too, and wait until nothing is left of them."""
        self._closed = True
        self._send_away(WorkerFault("closed", "the sandbox was closed"))
        for task in self._work:
            task.cancel()
        for member in (*self._ready, *self._lent, *self._own):
            self._spawn(member.launched.stop(), self._stops)
        self._ready.clear()
        while tasks := self._work | self._stops:
            await asyncio.wait(tasks)
