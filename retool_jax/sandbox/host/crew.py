"""The workers that a sandbox keeps ready: it starts, tests, replaces and stops them."""

import asyncio
import json
import os
import random
import time
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

from retool_jax.sandbox.host.cores import Cores
from retool_jax.sandbox.host.member import Member, WorkerFault
from retool_jax.sandbox.host.metrics import Metrics
from retool_jax.sandbox.host.queue import Line, Queue
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.launch.launchers import Launcher
from retool_jax.sandbox.types import SandboxConfig

START_S = 60.0  # a cold start of the heavy fork servers on a loaded machine
STARTS = 2 * (os.cpu_count() or 1) + 2  # at a time: more would only make each of them slower
PROBE_WALL_S = 5.0
BREAKER = 5  # failed starts in a row after which calls fail at once instead of waiting for the next start
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 10.0
MEMORY_CALLS = 50  # calls between two checks of a worker's memory
MEMORY_S = 1.0  # how long it must hold too much: some kernels free a program's memory late
TEND_S = 1.0
WARM_S = 1.0  # idle time after which a worker starts needed fork servers, which takes a second or two of processor time
NEEDED_S = 600.0  # how long a fork server counts as needed after a program used it


def pause_s(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubling, and random so that not all retry at once."""
    return min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)


class Crew:
    """A worker for each slot of the queue and a spare; used-up, faulty and dead ones are replaced in the background.

    A replacement serves as soon as it runs the fork servers that programs used in the last `NEEDED_S` seconds, so that
    no program gets a slower worker than others did. Until then calls wait, unless the spare is there. If there are no
    more cores than slots, a spare that was taken is replaced while a slot is idle: a start beside a program would make
    the program twice as slow.

    A failed start is repeated with growing pauses as long as the crew is open. After `BREAKER` failures in a row `take`
    raises at once; the next successful start ends that.
    """

    def __init__(self, launcher: Launcher, config: SandboxConfig, metrics: Metrics, queue: Queue) -> None:
        self.description = ""
        self._launcher, self._config, self._metrics, self._queue = launcher, config, metrics, queue
        self._ready: list[Member] = []
        self._lent: set[Member] = set()  # given to calls that return them
        self._own: set[Member] = set()  # given to sessions and large calls, which do not return them
        self._waiting: Line[Member] = Line(self._admit)
        self._work: set[asyncio.Task] = set()  # starts, and `_tend`
        self._stops: set[asyncio.Task] = set()
        self._starting = self._probing = 0
        self._failures = 0
        self._last_fault = ""
        self._cores = Cores(queue.slots + 1)
        self._tier_used: dict[str, float] = {}  # when a program last used each fork server
        self._closed = False

    @property
    def ready(self) -> int:
        """Workers that wait for a call."""
        return len(self._ready)

    @property
    def broken(self) -> bool:
        """Whether no worker is available and starts keep failing."""
        return self._failures >= BREAKER and not self._ready and not self._lent

    async def open(self) -> None:
        """Start the first worker; the others follow. Raises WorkerFault if it does not start."""
        self._ready.append(await self.recruit(self._config.limits.memory_mb))
        self._refill()
        self._spawn(self._tend(), self._work)

    async def recruit(self, memory_mb: int, warm: bool = False) -> Member:
        """Start a worker for programs of up to `memory_mb`; with `warm`, also the fork servers that programs need.

        Raises WorkerFault.
        """
        begun, core = time.monotonic(), self._cores.assign()
        launched = None
        try:
            launched = await self._launcher.launch(self._config, memory_mb)
            member = Member(launched, memory_mb, core)
            if not self._launcher.COUNTS_CORES:
                launched.move(self._cores.among(core))
            hello = await member.exchange(b"", START_S)
            launched.move(self._cores.among(core))
            self.description = self._launcher.describe(hello["isolation"])
            if warm:
                await self._warm(member)
            launched.note_machinery()
            if self._closed:
                raise WorkerFault("closed", "the sandbox was closed")
        except BaseException as fault:
            self._cores.leave(core)
            if launched is not None:
                await launched.stop()
            # Any error becomes a WorkerFault. `_start` counts only these, and after an error that it did not count it
            # would start again at once, without end.
            if isinstance(fault, Exception) and not self._closed:
                raise WorkerFault("start", f"no worker started: {fault}") from None
            raise
        self._metrics.start_s.add(time.monotonic() - begun)
        return member

    async def take(self, memory_mb: int) -> Member:
        """A worker for one call; pass it to `give` or `drop` afterwards. Raises WorkerFault.

        A call that may use more memory than the others gets its own worker, so that the limits of theirs stay tight.
        """
        if memory_mb > self._config.limits.memory_mb:
            return await self.claim(memory_mb)
        while self._ready:
            busy = self._busy()
            # The worker whose core is the least busy; of several, the one used last, whose caches are the warmest.
            member = min(reversed(self._ready), key=lambda member: busy[member.core])
            self._ready.remove(member)
            if not member.dead:
                self._lend(member)
                return member
            self._retire(member, "died idle")
        if self.broken:
            raise WorkerFault("start", f"{self._failures} starts in a row failed, the last one: {self._last_fault}")
        self._refill()
        return await self._waiting.wait()

    async def claim(self, memory_mb: int) -> Member:
        """A worker that is not used again afterwards; pass it to `drop` then. Raises WorkerFault."""
        default = self._config.limits.memory_mb
        idle = [member for member in self._ready if not member.calls and not member.dead]
        # The spare may be taken; the workers of the slots may not.
        if memory_mb <= default and idle and len(self._ready) + len(self._lent) > self._queue.slots:
            member = idle[0]
            self._ready.remove(member)
            self._refill()
        else:
            member = await self.recruit(max(memory_mb, default))
        self._own.add(member)
        return member

    def give(self, member: Member, response: dict) -> None:
        """Return a worker after a call that it answered."""
        age = time.monotonic() - member.born
        self._tier_used[member.tier] = time.monotonic()
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
            self._admit(member)

    def _too_heavy(self, member: Member) -> bool:
        """Whether a worker has held too much memory for a while."""
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
        """Stop a worker in the background and replace it, unless it belonged to one owner."""
        self._lent.discard(member)
        self._own.discard(member)
        self._retire(member, reason)

    def _admit(self, member: Member) -> None:
        """Give a worker to the caller that has waited longest, or keep it ready."""
        self._lent.discard(member)
        if self._closed:
            return self._retire(member, "closed")
        member.idle_since = time.monotonic()
        if self._waiting.hand(member):
            self._lend(member)
        else:
            self._ready.append(member)

    def settle(self, member: Member) -> None:
        """Move a worker that is about to run something to the least busy core."""
        core = self._cores.best(member.core, self._busy())
        if core != member.core:
            member.launched.move(self._cores.among(core))
            self._cores.leave(member.core)
            self._cores.enter(core)
            member.core = core

    def _busy(self) -> Counter[int | None]:
        """The number of lent workers on each core."""
        return Counter(member.core for member in self._lent)

    def _lend(self, member: Member) -> None:
        self.settle(member)
        self._lent.add(member)

    def _retire(self, member: Member, reason: str) -> None:
        if not self._closed:
            self._metrics.restarts[reason] += 1
        self._cores.leave(member.core)
        self._spawn(member.launched.stop(), self._stops)
        self._refill()

    def _spawn(self, work: Coroutine[Any, Any, Any], tasks: set[asyncio.Task]) -> None:
        task = asyncio.create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def _refill(self) -> None:
        """Start missing workers, `STARTS` at once or one while starts fail. The spare waits for an idle core."""
        if self._closed:
            return
        have = len(self._ready) + len(self._lent) + self._probing + self._starting
        spare = self._cores.enough or self._queue.busy < self._queue.slots
        missing = self._queue.slots + spare - have
        missing = min(missing, (1 if self._failures else STARTS) - self._starting)
        for _ in range(missing):
            self._starting += 1
            self._spawn(self._start(), self._work)

    async def _start(self) -> None:
        try:
            if self._failures:
                await asyncio.sleep(pause_s(self._failures))
            member = await self.recruit(self._config.limits.memory_mb, warm=True)
        except WorkerFault as fault:
            self._metrics.faults[fault.kind] += 1
            self._failures += 1
            self._last_fault = str(fault)
            if self.broken:
                self._waiting.send_away(fault)
        else:
            self._failures = 0
            self._admit(member)
        finally:
            self._starting -= 1
            self._refill()

    async def _tend(self) -> None:
        """Check idle workers once a second: replace dead and old ones, start fork servers that programs need, and test
        those that were idle for long."""
        while True:
            await asyncio.sleep(TEND_S)
            self._refill()
            now = time.monotonic()
            for member in tuple(self._ready):
                old, idle = now - member.born, now - member.idle_since
                cold = self._cold(member) and not self._waiting
                due = 0 < self._config.probe_s <= idle or (cold and idle >= WARM_S)
                if not member.dead and old < self._config.recycle_s and not due:
                    continue
                if member not in self._ready:  # taken while another one was tested
                    continue
                self._ready.remove(member)
                if member.dead or old >= self._config.recycle_s:
                    self._retire(member, "died idle" if member.dead else "age")
                else:
                    await self._probe(member)

    def _cold(self, member: Member) -> list[str]:
        """The fork servers that programs need and that do not run in this worker."""
        since = time.monotonic() - NEEDED_S
        return sorted(name for name, used in self._tier_used.items() if used > since and name not in member.tiers)

    async def _warm(self, member: Member) -> None:
        """Start the needed fork servers that a worker lacks. Raises WorkerFault."""
        if cold := self._cold(member):
            await member.exchange(json.dumps({"op": "warm", "tiers": cold}).encode(), START_S)
            member.tiers.update(cold)

    async def _probe(self, member: Member) -> None:
        """Test an idle worker, or start the fork servers that it lacks; then keep or replace it."""
        self._probing += 1
        limits = replace(self._config.limits, wall_s=PROBE_WALL_S)
        reason = "closed"  # what interrupts a probe is the end of the crew
        try:
            if self._cold(member):
                await self._warm(member)
                member.launched.note_machinery()
            else:
                result, response = await member.perform(Request("print(2 + 2)", limits=limits))
                if result.stdout != "4\n" or not response.get("clean"):
                    raise WorkerFault("probe", f"print(2 + 2) ended as {result.status}: {result.stdout[:80]!r}")
            reason = ""
        except WorkerFault as fault:
            self._metrics.faults[fault.kind] += 1
            reason = "probe"
        finally:
            self._probing -= 1
            if reason:
                self._retire(member, reason)
            else:
                self._admit(member)

    async def close(self) -> None:
        """Stop every worker, even if it runs a program, and wait until nothing is left of them."""
        self._closed = True
        self._waiting.send_away(WorkerFault("closed", "the sandbox was closed"))
        for task in self._work:
            task.cancel()
        for member in (*self._ready, *self._lent, *self._own):
            self._spawn(member.launched.stop(), self._stops)
        self._ready.clear()
        while tasks := self._work | self._stops:
            await asyncio.wait(tasks)
        self._cores.close()
