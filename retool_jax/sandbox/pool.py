"""The asyncio side: single-slot workers, a fair queue in front of them, retries of what was not the program's fault."""

import asyncio
import base64
import json
import struct
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace

from retool_jax.errors import UserError
from retool_jax.sandbox import process
from retool_jax.sandbox.types import MAX_CODE_BYTES, MAX_STDIN_BYTES, Limits, SandboxConfig, ToolResult

# A back-end is a module: `launch() -> Worker` (reader, writer, last_words(), stop()), `describe(isolation) -> str` and
# the ENVIRONMENT its programs see.
BACKENDS = {"process": process}

START_S = 30.0
OVERTIME_S = 3.0  # what a worker gets beyond a program's own time limit before it counts as hung
MAX_FRAME_BYTES = 64 << 20


class WorkerFault(Exception):
    """A worker did not start, died, hung, or answered nonsense."""


class Overloaded(Exception):
    """The queue is full."""


class Closed(Exception):
    """The sandbox was closed while a call waited for a slot."""


async def read_frame(reader: asyncio.StreamReader) -> dict:
    (size,) = struct.unpack(">I", await reader.readexactly(4))
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {size} bytes")
    return json.loads(await reader.readexactly(size))


async def exchange(worker: process.Worker, request: dict | None, timeout_s: float) -> dict:
    """Send a request (None: just listen) and wait for the worker's next frame. Raises WorkerFault."""
    try:
        async with asyncio.timeout(timeout_s):
            if request is not None:
                payload = json.dumps(request).encode()
                worker.writer.write(struct.pack(">I", len(payload)) + payload)
                await worker.writer.drain()
            return await read_frame(worker.reader)
    except TimeoutError:
        raise WorkerFault(f"the worker did not answer within {timeout_s:g} s") from None
    except (asyncio.IncompleteReadError, ConnectionError):
        raise WorkerFault(f"the worker died: {await worker.last_words() or 'no last words'}") from None
    except ValueError as error:
        raise WorkerFault(f"the worker answered nonsense: {error}") from None


def to_result(response: dict) -> ToolResult:
    """A worker's response as a result. Raises WorkerFault if it is not one."""
    try:
        streams = {}
        for name, stream in zip(("stdout", "stderr"), response["streams"], strict=True):
            streams[name] = base64.b64decode(stream["data"]).decode("utf-8", "replace")
            streams[f"{name}_bytes"] = stream["bytes"]
            streams[f"{name}_truncated"] = stream["truncated"]
        return ToolResult(**response["result"], **streams)
    except (KeyError, TypeError, ValueError) as error:
        raise WorkerFault(f"the worker answered nonsense: {error!r}") from None


def refusal(code: str, stdin: str) -> str:
    """Why a request is not run at all; empty if it is."""
    if "\0" in code:
        return "the code contains a NUL character"
    for name, text, limit in (("code", code, MAX_CODE_BYTES), ("stdin", stdin, MAX_STDIN_BYTES)):
        if (size := len(text.encode("utf-8", "surrogatepass"))) > limit:
            return f"the {name} has {size} bytes, the limit is {limit}"
    return ""


@dataclass
class Slot:
    """A place for one worker; empty after a fault, until the next call that gets it starts another."""

    worker: process.Worker | None = None


class Sandbox:
    """A pool of workers of one back-end. Made by `open_sandbox`."""

    def __init__(self, backend: str, config: SandboxConfig):
        self.backend = backend
        self.description = ""
        self.config = config
        self._module = BACKENDS[backend]
        self._slots = [Slot() for _ in range(config.slots)]
        self._idle = deque(self._slots)
        self._waiting: deque[asyncio.Future[Slot]] = deque()
        self._stopping: set[asyncio.Task[None]] = set()
        self._closed = False

    async def run(self, code: str, stdin: str = "", limits: Limits | None = None) -> ToolResult:
        """Run a program. Every fault is a status of the result; cancelling the caller kills the program.

        Raises RuntimeError if the sandbox is already closed.
        """
        if self._closed:
            raise RuntimeError("the sandbox is closed")
        asked = time.monotonic()
        if reason := refusal(code, stdin):
            return ToolResult("rejected", backend=self.backend, message=reason)
        limits = limits or self.config.limits
        request = {
            "code": code,
            "stdin": base64.b64encode(stdin.encode("utf-8", "surrogatepass")).decode(),
            "limits": asdict(limits),
            "show_last_expression": self.config.show_last_expression,
        }
        try:
            slot = await self._acquire()
        except Overloaded:
            message = f"overloaded: {self.config.max_waiting} calls already wait for {self.config.slots} slots"
            return ToolResult("infra_error", backend=self.backend, message=message)
        except Closed:
            return ToolResult("cancelled", backend=self.backend, message="the sandbox was closed")
        try:
            return await self._run_in(slot, request, limits, asked)
        finally:
            self._release(slot)

    async def _run_in(self, slot: Slot, request: dict, limits: Limits, asked: float) -> ToolResult:
        attempts, message = 0, ""
        while attempts <= self.config.retries and not self._closed:
            attempts += 1
            try:
                if slot.worker is None:
                    await self._start(slot)
                queue_s = time.monotonic() - asked
                response = await exchange(slot.worker, request, limits.wall_s + OVERTIME_S)
                result = to_result(response)
            except WorkerFault as fault:
                message = str(fault)
                self._discard(slot)
                continue
            except BaseException:  # cancelled: the program must not live on
                self._discard(slot)
                raise
            if not response["clean"]:  # something of the program could not be killed
                self._discard(slot)
            if result.status == "infra_error":
                message = f"{result.message}: {result.stderr[-500:].strip()}"
                continue
            return replace(result, backend=self.backend, attempts=attempts, queue_s=queue_s)
        status = "cancelled" if self._closed else "infra_error"
        message = "the sandbox was closed" if self._closed else message
        return ToolResult(
            status, backend=self.backend, attempts=attempts, queue_s=time.monotonic() - asked, message=message
        )

    async def _acquire(self) -> Slot:
        """The next free slot, first come first served. A slot is handed over directly, so nobody can overtake."""
        if self._idle:
            return self._idle.popleft()
        if len(self._waiting) >= self.config.max_waiting:
            raise Overloaded
        turn: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif turn.done() and not turn.cancelled() and turn.exception() is None:
                self._release(turn.result())  # cancelled between being handed the slot and waking up
            raise

    def _release(self, slot: Slot) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(slot)
                return
        self._idle.append(slot)

    async def _start(self, slot: Slot) -> None:
        """Put a new worker into the slot. Raises WorkerFault."""
        try:
            slot.worker = await self._module.launch()
        except OSError as error:
            raise WorkerFault(f"the worker did not start: {error}") from None
        hello = await exchange(slot.worker, None, START_S)
        self.description = self._module.describe(hello["isolation"])
        if self._closed:
            raise WorkerFault("the sandbox was closed")

    def _discard(self, slot: Slot) -> None:
        """Empty the slot at once; its worker is stopped in the background."""
        if slot.worker is not None:
            task = asyncio.create_task(slot.worker.stop())
            self._stopping.add(task)
            task.add_done_callback(self._stopping.discard)
            slot.worker = None

    async def _self_test(self) -> None:
        """Raises WorkerFault if the back-end does not do what it promises."""
        result = await self.run("import os\nprint(2 + 2, *sorted(os.environ))", limits=Limits())
        expected = " ".join(["4", *sorted(self._module.ENVIRONMENT)]) + "\n"
        if result.status != "success" or result.stdout != expected:
            raise WorkerFault(
                f"self-test: {result.status} {result.message} {(result.stderr or result.stdout)[-300:].strip()!r}"
            )

    async def open(self) -> None:
        """Start all workers and try one. Raises WorkerFault."""
        starts = await asyncio.gather(*map(self._start, self._slots), return_exceptions=True)
        for fault in filter(None, starts):
            raise fault
        await self._self_test()

    async def aclose(self) -> None:
        """Kill what runs, answer what waits with `cancelled`, and wait until no process is left."""
        self._closed = True
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_exception(Closed())
        for slot in self._slots:
            self._discard(slot)
        for slot in [await self._acquire() for _ in self._slots]:  # once every call has let go of its slot
            self._discard(slot)
        while self._stopping:
            await asyncio.gather(*self._stopping, return_exceptions=True)


@asynccontextmanager
async def open_sandbox(config: SandboxConfig | None = None) -> AsyncIterator[Sandbox]:
    """The first back-end of the list that passes its self-test. Raises UserError if none does."""
    config = config or SandboxConfig()
    for name in config.backend:
        if name not in BACKENDS:
            raise UserError(f"sandbox.backend: there is no {name!r}; there is {', '.join(BACKENDS)}")
    faults = []
    for name in config.backend:
        box = Sandbox(name, config)
        try:
            await box.open()
        except (WorkerFault, UserError) as fault:
            faults.append(f"{name}: {fault}")
            await box.aclose()
            continue
        except BaseException:
            await box.aclose()
            raise
        try:
            yield box
        finally:
            await box.aclose()
        return
    raise UserError(f"no sandbox back-end of {list(config.backend)} works here. {'; '.join(faults)}")
