"""A session: one interpreter that is kept for one trajectory; each of its cells has the same limits."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol, Self

from retool_jax.sandbox.host.crew import Crew
from retool_jax.sandbox.host.member import Member, WorkerFault
from retool_jax.sandbox.host.metrics import Metrics
from retool_jax.sandbox.host.queue import Closed, Overloaded, Queue
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.types import Limits, SandboxConfig, Status, ToolResult

BY_PROGRAMS = ("memory limit", "overrun", "broken", "unclean")  # ways to lose a worker that the cell itself caused
ENDED = "the interpreter ended, and with it all that earlier code defined"


class Parent(Protocol):
    """The part of a sandbox that its sessions need."""

    backend: str
    crew: Crew
    metrics: Metrics
    sessions: Queue

    async def serve(self, request: Request, source: "Session", retries: int) -> ToolResult:
        """Run a request in the worker of `source`."""


class Session:
    """Keeps variables, imports and files from one `run` to the next. `Sandbox.session` makes it.

    It has its own worker from its first cell on. A running cell takes one of the sandbox's slots, like any call. A cell
    that is killed at a limit, or that exits, ends the interpreter: the result's `message` says so, and the next cell
    gets a fresh one. If the machinery loses the interpreter, or the session is idle for longer than `session_ttl_s`,
    that cell and all later ones are `infra_error`: otherwise a program would be blamed for the missing variables.
    """

    def __init__(self, box: Parent, config: SandboxConfig) -> None:
        self._box = box
        self._config = config
        self._member: Member | None = None
        self._turn = asyncio.Lock()
        self._fresh = True  # nothing has run in the interpreter yet, so a cell can be repeated
        self._holds_place = False  # whether it holds one of `Parent.sessions`
        self._end_reason = ""  # why no further cell runs; empty while the session is open
        self._end_status: Status = "rejected"
        self._expiry: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._end("the session is closed")

    async def run(
        self,
        code: str,
        stdin: str = "",
        files: Mapping[str, bytes] | None = None,
        fetch: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> ToolResult:
        """Run a cell; see `Sandbox.run`. The cells of a session run one after the other."""
        async with self._turn:
            if self._expiry is not None:
                self._expiry.cancel()
            try:
                return await self._cell(Request.of(self._config, code, stdin, files, fetch, limits, op="cell"))
            finally:
                if not self._end_reason:
                    self._expiry = asyncio.get_running_loop().call_later(self._config.session_ttl_s, self._expire)

    async def _cell(self, request: Request) -> ToolResult:
        config, limits = self._config, request.limits
        if not self._end_reason:
            if reason := request.fault():
                return self._answer("rejected", reason)
            if self._member is not None and limits.memory_mb > (most := self._member.memory_mb):
                return self._answer("rejected", f"memory_mb={limits.memory_mb}: this session began with at most {most}")
            if not self._holds_place:
                try:
                    await self._box.sessions.acquire()
                except Overloaded:
                    return self._answer("infra_error", f"overloaded: {config.sessions} sessions are open")
                except Closed:
                    return self._answer("cancelled", "the sandbox was closed")
                self._holds_place = True
        if self._end_reason:  # also if it was closed while this cell waited
            self._end(self._end_reason)
            return self._answer(self._end_status, self._end_reason)
        result = await self._box.serve(request, self, config.retries if self._fresh else 0)
        if self._fresh and result.status not in ("rejected", "infra_error", "cancelled"):
            return replace(result, message="; ".join(filter(None, (result.message, ENDED))))
        return result

    def _answer(self, status: Status, message: str) -> ToolResult:
        result = ToolResult(status, backend=self._box.backend, message=message)
        self._box.metrics.record(result)
        return result

    async def take(self, memory_mb: int) -> Member:
        """The session's worker (for `Sandbox.serve`)."""
        if self._end_reason:
            raise WorkerFault("closed", self._end_reason)
        if self._member is None:
            member = await self._box.crew.claim(memory_mb)
            if self._end_reason:  # closed meanwhile
                self._box.crew.drop(member, "session end")
                raise WorkerFault("closed", self._end_reason)
            self._member = member
        self._box.crew.settle(self._member)
        return self._member

    def give(self, member: Member, response: dict) -> None:
        """Keep the worker after a cell that it answered."""
        self._fresh = bool(response.get("ended"))
        if not response.get("clean"):
            self.drop(member, "unclean")

    def drop(self, member: Member, reason: str) -> None:
        """Give up the worker, unless the session was closed meanwhile and has done so already."""
        if member is not self._member:
            return
        self._member = None
        self._box.crew.drop(member, reason)
        if not self._fresh and reason not in BY_PROGRAMS:
            why = f"the session's interpreter was lost ({reason}), and with it all that earlier code defined"
            self._end(why, "infra_error")
        self._fresh = True

    def _expire(self) -> None:
        self._end(f"the session was closed after {self._config.session_ttl_s:g} s without a call", "infra_error")

    def _end(self, why: str, status: Status = "rejected") -> None:
        if self._expiry is not None:
            self._expiry.cancel()
        if not self._end_reason:
            self._end_reason, self._end_status = why, status
        if self._member is not None:
            member, self._member = self._member, None
            self._box.crew.drop(member, "session end")
        if self._holds_place:
            self._holds_place = False
            self._box.sessions.release()
