"""`Sandbox`: a fair queue in front of workers, and retries after faults that are not the program's."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from retool_jax.sandbox.host.crew import Crew, pause_s
from retool_jax.sandbox.host.member import Member, WorkerFault
from retool_jax.sandbox.host.metrics import Metrics
from retool_jax.sandbox.host.queue import Closed, Overloaded, Queue
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.host.selftest import check_promises
from retool_jax.sandbox.host.session import Session
from retool_jax.sandbox.launch.launchers import LAUNCHERS
from retool_jax.sandbox.types import Limits, SandboxConfig, Status, ToolResult

RETRY_BUDGET_S = 120.0  # no attempt begins later than this after the first one
QUIET_S = 600.0  # for how long a worker that was lost under an innocent program casts doubt on later losses
NOT_BY_PROGRAMS = frozenset({"crashed", "killed", "stopped"})  # losses that do not count against the program


class Sandbox:
    """Runs programs in workers of one back-end. `open_sandbox` makes it."""

    def __init__(self, backend: str, config: SandboxConfig) -> None:
        self.backend = backend
        self.config = config
        self.metrics = Metrics()
        self.sessions = Queue(config.sessions, 1 << 20, config.queue_s)  # its slots are held by open sessions
        self._queue = Queue(config.slot_count, config.max_waiting, config.queue_s)
        self.crew = Crew(LAUNCHERS[backend], config, self.metrics, self._queue)
        self._innocent_loss = -QUIET_S
        self._closed = False

    @property
    def description(self) -> str:
        """One line for people: the back-end and what it isolates."""
        return self.crew.description

    async def run(
        self,
        code: str,
        stdin: str = "",
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        limits: Limits | None = None,
        *,
        show_last_expression: bool | None = None,
        allowed_modules: Sequence[str] | None = None,
    ) -> ToolResult:
        """Run a program. Every fault becomes a status of the result. Cancelling the caller kills the program.

        Args:
            code: the program.
            stdin: all that it can read from its standard input.
            files: content by relative path, written to its working directory first.
            fetch: relative paths to return in `ToolResult.files`, if they are regular files afterwards.
            limits: instead of the configuration's.
            show_last_expression: instead of the configuration's.
            allowed_modules: instead of the configuration's.

        Raises:
            RuntimeError: the sandbox is closed.
        """
        return await self.serve(
            Request.of(self.config, code, stdin, files, fetch, limits, show_last_expression, allowed_modules)
        )

    def session(self) -> Session:
        """An interpreter that stays: `async with box.session() as session: await session.run(...)`."""
        return Session(self, self.config)

    async def serve(self, request: Request, source: Session | None = None, retries: int | None = None) -> ToolResult:
        """`run` for a request that exists already.

        Args:
            request: what to run.
            source: the session whose worker runs it; None: a worker of the crew.
            retries: instead of the configuration's.
        """
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        asked = time.monotonic()
        if reason := request.fault():
            result = ToolResult("rejected", message=reason)
        else:
            try:
                await self._queue.acquire()
            except Overloaded as refusal:
                self.metrics.faults["overloaded"] += 1
                result = ToolResult("infra_error", queue_s=time.monotonic() - asked, message=str(refusal))
            except Closed:
                result = self._cancelled()
            else:
                try:
                    retries = self.config.retries if retries is None else retries
                    result = await self._attempts(request, source or self.crew, retries, asked)
                finally:
                    self._queue.release()
        result = replace(result, backend=self.backend)
        self.metrics.record(result)
        return result

    async def _attempts(self, request: Request, source: Crew | Session, retries: int, asked: float) -> ToolResult:
        """Run a request until an attempt gives a result; `asked` is when the caller asked for it."""
        limits = request.limits
        losses = attempts = 0
        last_start = time.monotonic() + RETRY_BUDGET_S
        while not self._closed:
            attempts += 1
            member: Member | None = None
            started = time.monotonic()
            try:
                member = await source.take(limits.memory_mb)
                started = time.monotonic()
                result, response = await member.perform(request)
            except WorkerFault as fault:
                wall_s, message = time.monotonic() - started, str(fault)
                if self._closed:
                    break
                if member is not None:
                    kind = "memory limit" if member.launched.ran_out_of_memory() else fault.kind
                    source.drop(member, kind)
                    losses += kind not in NOT_BY_PROGRAMS
                    last = attempts > retries or time.monotonic() > last_start
                    verdict = self._verdict(kind, losses, last, limits)
                    if verdict is not None:
                        return replace(verdict, attempts=attempts, queue_s=started - asked, wall_s=wall_s)
                self.metrics.faults[fault.kind] += 1
            except BaseException:  # cancelled: the program must not go on running
                if member is not None:
                    source.drop(member, "cancelled")
                raise
            else:
                if result.status != "infra_error":
                    source.give(member, response)
                    if losses:
                        self._innocent_loss = time.monotonic()
                    return replace(result, attempts=attempts, queue_s=started - asked)
                source.drop(member, "confinement")
                self.metrics.faults["confinement"] += 1
                message = f"{result.message}: {result.stderr[-500:].strip()}"
            if attempts > retries or time.monotonic() > last_start or (member is None and self.crew.broken):
                queue_s = time.monotonic() - asked
                return ToolResult("infra_error", attempts=attempts, queue_s=queue_s, message=message)
            await asyncio.sleep(pause_s(attempts))
        return replace(self._cancelled(), attempts=attempts)

    def _verdict(self, kind: str, losses: int, last: bool, limits: Limits) -> ToolResult | None:
        """The result of a call that lost `losses` workers, the last one by `kind`; None if it may not be the program's
        doing.

        Two kinds are proof at once: a worker at its memory limit, and one that the program keeps too busy to answer.
        So is a broken worker at the call's `last` attempt. Otherwise the second loss counts as the program's doing.
        If in the last `QUIET_S` seconds a program lost a worker and then succeeded, workers may be dying by
        themselves, and the third loss decides.
        """
        status: Status = "user_error"
        if kind == "memory limit":
            status, message = "oom", f"memory limit of {limits.memory_mb} MB exceeded"
        elif kind == "overrun":
            status, message = "timeout", f"time limit of {limits.wall_s:g} s reached (what it had printed is lost)"
        else:
            quiet = time.monotonic() - self._innocent_loss >= QUIET_S
            if losses < (2 if quiet else 3) and not (kind == "broken" and last):
                return None
            message = f"the program killed the sandbox{f', {losses} times in a row' if losses > 1 else ''}"
        return ToolResult(status, return_code=-9, signal=9, message=message)

    def _cancelled(self) -> ToolResult:
        return ToolResult("cancelled", message="the sandbox was closed")

    def gauges(self) -> dict[str, float]:
        """Current values by name, for `metrics.prometheus`."""
        return {
            "slots": self._queue.slots,
            "slots_busy": self._queue.busy,
            "queue_length": self._queue.waiting,
            "sessions_open": self.sessions.busy,
            "workers_ready": self.crew.ready,
            "accepting": float(not self._closed and not self.crew.broken),
        }

    async def open(self) -> None:
        """Remove what dead owners left, start the workers and test the back-end's promises.

        Raises WorkerFault or UserError, also if a promise does not hold.
        """
        launcher = LAUNCHERS[self.backend]
        await launcher.sweep_stale()
        await self.crew.open()
        await check_promises(self, launcher.PROMISES)
        started = self.metrics.start_s
        self.metrics.__init__()  # the calls of the self-test do not count
        self.metrics.start_s = started

    async def aclose(self) -> None:
        """Kill running programs, answer waiting calls with `cancelled`, and wait until no process is left."""
        self._closed = True
        self._queue.close()
        self.sessions.close()
        await self.crew.close()
