"""The `remote` back-end: programs run on one or several Sandbox Fusion servers, of this project or of others."""

import asyncio
import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

from retool_jax.errors import UserError
from retool_jax.sandbox.host.crew import pause_s
from retool_jax.sandbox.host.member import OVERTIME_S
from retool_jax.sandbox.host.metrics import Metrics
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.remote.fusion import read_result, write_request
from retool_jax.sandbox.types import TOKEN_VARIABLE, Limits, SandboxConfig, ToolResult, shown

BREAKER = 3  # faults in a row after which a server gets no calls for a while
FIRST_REST_S, LONGEST_REST_S = 1.0, 30.0
BUSY_S = 0.5  # pause for a full server that does not name one
OPEN_S = 60.0  # for the first program
PING_S = 5.0  # between two pings of servers that hold calls of ours, and how long an answer may take
SILENT_PINGS = 2  # unanswered pings after which calls there are given up and go elsewhere
REFUSED_STATUS = (400, 413, 422)  # errors in the content of this request; the server itself works
BUSY_STATUS = (429, 503)


class _Fault(Exception):
    """An attempt failed for a reason that says nothing about the program."""


class _Busy(Exception):
    """The server has no room."""


@dataclass(eq=False)
class Endpoint:
    """A server and its recent behaviour."""

    url: str
    failures: int = 0  # in a row
    rest_until: float = 0.0  # end of the pause after failures
    busy_until: float = 0.0
    silent: int = 0  # unanswered pings in a row
    calls: set[asyncio.Task] = field(default_factory=set)

    def available(self, now: float) -> bool:
        """Whether to send it a call; after a pause, a single call tests whether it works again."""
        return now >= self.busy_until and (self.failures < BREAKER or (now >= self.rest_until and not self.calls))

    def failed(self) -> None:
        self.failures += 1
        rest_s = min(FIRST_REST_S * 2 ** max(self.failures - BREAKER, 0), LONGEST_REST_S)
        self.rest_until = time.monotonic() + rest_s * random.uniform(0.5, 1.5)


class RemoteSandbox:
    """The interface of `Sandbox` over HTTP: each call goes to the least loaded server that works. `open_sandbox` makes
    it, with `backend=("remote",)` and `urls`.

    After a fault (no connection, a cut-off answer, 502, 504, SandboxError) a call is repeated, elsewhere if possible,
    `retries` times with growing pauses. Full servers are asked again until `queue_s` is over. The servers are
    responsible for the isolation; it cannot be tested from here.
    """

    backend = "remote"

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        self.metrics = Metrics()
        self.description = f"remote: {', '.join(config.urls)} (what they isolate is theirs to say)"
        self._endpoints = [Endpoint(url.rstrip("/")) for url in config.urls]
        self._session = None
        self._watch: asyncio.Task[None] | None = None
        self._closed = False

    async def open(self) -> None:
        """Check that a server answers and can compute a sum. Raises UserError."""
        if not self._endpoints:
            raise UserError("no servers given; set sandbox.urls=[http://HOST:PORT,...]")
        try:
            import aiohttp
        except ModuleNotFoundError:
            raise UserError("it needs aiohttp; pip install 'retool_jax[sandbox]'") from None
        token = self.config.token or os.environ.get(TOKEN_VARIABLE)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._session = aiohttp.ClientSession(
            headers=headers, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        self._watch = asyncio.create_task(self._watch_servers())
        if not any(await asyncio.gather(*map(self._ping, self._endpoints))):
            servers = ", ".join(self.config.urls)
            raise UserError(
                f"none of {servers} answers GET /v1/ping; start one with python -m retool_jax.sandbox.server"
            )
        try:
            async with asyncio.timeout(OPEN_S):
                result = await self.run("print(2 + 2)")
        except TimeoutError:
            raise UserError(f"self-test: print(2 + 2) had no answer in {OPEN_S:g} s") from None
        if result.stdout != "4\n":
            raise UserError(f"self-test: print(2 + 2) ended as {result.status}: {result.message or result.stderr}")

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
        """Run a program; see `Sandbox.run`. Other projects' servers ignore the last two options and some limits."""
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        request = Request.of(self.config, code, stdin, files, fetch, limits, show_last_expression, allowed_modules)
        if reason := request.fault():
            result = ToolResult("rejected", message=reason)
        else:
            result = await self._serve(request)
        result = replace(result, backend=f"remote/{result.backend}" if result.backend else "remote")
        self.metrics.record(result)
        return result

    def session(self) -> NoReturn:
        """Raises UserError: the protocol keeps no state between calls, so there are no sessions."""
        raise UserError("sandbox sessions need a back-end on this machine; sandbox.backend=[remote] has none")

    async def _serve(self, request: Request) -> ToolResult:
        """Send a request to servers until one gives a result, or time or retries are used up."""
        asked = time.monotonic()
        queue_until = asked + self.config.queue_s
        until = queue_until + (self.config.retries + 1) * (request.limits.wall_s + OVERTIME_S)
        payload = json.dumps(write_request(request)).encode()
        faults, message, waited_s = 0, "", 0.0
        while not self._closed:
            endpoint = self._choose()
            try:
                if endpoint is None and any(e.busy_until > time.monotonic() for e in self._endpoints):
                    raise _Busy
                if endpoint is None:
                    raise _Fault(message or f"none of {len(self._endpoints)} servers works")
                result = await self._post(endpoint, payload, request.limits, until - time.monotonic())
            except _Busy:
                now = time.monotonic()
                if now >= queue_until:
                    self.metrics.faults["overloaded"] += 1
                    message = f"overloaded: all servers were full for {self.config.queue_s:g} s"
                    return ToolResult("infra_error", attempts=faults, queue_s=now - asked, message=message)
                wait_s = min((e.busy_until for e in self._endpoints if e.busy_until > now), default=now) - now
                await asyncio.sleep(min(max(wait_s, 0.01) * random.uniform(1.0, 1.5), queue_until - now))
                waited_s = time.monotonic() - asked
            except _Fault as fault:
                if self._closed:
                    break
                self.metrics.faults["remote"] += 1
                faults, message = faults + 1, str(fault)
                if faults > self.config.retries or time.monotonic() >= until:
                    queue_s = time.monotonic() - asked
                    return ToolResult("infra_error", attempts=faults, queue_s=queue_s, message=message)
                await asyncio.sleep(pause_s(faults))
            else:
                return replace(result, attempts=result.attempts + faults, queue_s=result.queue_s + waited_s)
        return ToolResult("cancelled", attempts=faults, message="the sandbox was closed")

    def _choose(self) -> Endpoint | None:
        """The server for the next call, if any is available."""
        now = time.monotonic()
        free = [endpoint for endpoint in self._endpoints if endpoint.available(now)]
        return min(free, key=lambda e: (e.failures, len(e.calls), random.random()), default=None)

    async def _post(self, endpoint: Endpoint, payload: bytes, limits: Limits, timeout_s: float) -> ToolResult:
        """One attempt, which updates the endpoint. Raises _Busy or _Fault."""
        call = asyncio.create_task(self._exchange(endpoint, payload, limits, timeout_s))
        endpoint.calls.add(call)
        try:
            result = await asyncio.shield(call)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or not task.cancelling():  # `_watch_servers` gave it up, not our caller
                raise _Fault(f"{endpoint.url} stopped answering") from None
            call.cancel()
            await asyncio.wait([call])  # the connection closes, and the server kills the program
            raise
        except _Fault:
            endpoint.failed()
            raise
        finally:
            endpoint.calls.discard(call)
        endpoint.failures = 0
        return result

    async def _exchange(self, endpoint: Endpoint, payload: bytes, limits: Limits, timeout_s: float) -> ToolResult:
        import aiohttp

        assert self._session is not None
        headers = {"Content-Type": "application/json"}
        timeout = aiohttp.ClientTimeout(total=max(timeout_s, 0.1), sock_connect=PING_S)
        url = f"{endpoint.url}/run_code"
        try:
            async with self._session.post(url, data=payload, headers=headers, timeout=timeout) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Fault(f"{url}: {error or type(error).__name__}") from None
        if response.status in BUSY_STATUS:
            after = response.headers.get("Retry-After", "")
            endpoint.busy_until = time.monotonic() + (float(after) if after.isdecimal() else BUSY_S)
            raise _Busy
        if response.status != 200:
            text = body[:200].decode("utf-8", "replace")
            if response.status in REFUSED_STATUS:
                return ToolResult("rejected", message=f"the server answered HTTP {response.status}: {shown(text)}")
            if response.status in (401, 403):  # another attempt would end the same way
                return ToolResult("infra_error", attempts=1, message=f"{url}: HTTP {response.status}: {text}")
            raise _Fault(f"{url}: HTTP {response.status}: {text}")
        try:
            result = read_result(json.loads(body), limits)
        except (ValueError, RecursionError) as error:
            raise _Fault(f"{url}: {error}") from None
        if result.status in ("infra_error", "cancelled"):
            raise _Fault(f"{url}: {result.message}")
        return result

    async def _ping(self, endpoint: Endpoint) -> bool:
        import aiohttp

        assert self._session is not None
        try:
            timeout = aiohttp.ClientTimeout(total=PING_S)
            async with self._session.get(f"{endpoint.url}/v1/ping", timeout=timeout) as response:
                answered = response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            answered = False
        endpoint.silent = 0 if answered else endpoint.silent + 1
        return answered

    async def _watch_servers(self) -> None:
        """Give up calls at servers that stop answering pings: a machine that is lost does not close its connections."""
        while True:
            await asyncio.sleep(PING_S)
            holding = [endpoint for endpoint in self._endpoints if endpoint.calls]
            await asyncio.gather(*map(self._ping, holding))
            for endpoint in holding:
                if endpoint.silent >= SILENT_PINGS:
                    endpoint.failures = max(endpoint.failures, BREAKER - 1)
                    endpoint.failed()
                    for call in endpoint.calls:
                        call.cancel()

    def gauges(self) -> dict[str, float]:
        """Current values by name, for `metrics.prometheus`."""
        now = time.monotonic()
        return {
            "servers": len(self._endpoints),
            "servers_available": sum(endpoint.available(now) for endpoint in self._endpoints),
            "calls_in_flight": sum(len(endpoint.calls) for endpoint in self._endpoints),
            "accepting": float(not self._closed),
        }

    async def aclose(self) -> None:
        """Give up all calls (they end as `cancelled`) and close the connections."""
        self._closed = True
        calls = [call for endpoint in self._endpoints for call in endpoint.calls]
        if self._watch is not None:
            calls.append(self._watch)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)
        if self._session is not None:
            await self._session.close()
