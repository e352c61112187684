"""The back-ends of this machine, and fixtures that observe workers from outside."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.launch.launchers import LAUNCHERS

from .processes import below


@pytest.fixture(autouse=True)
def light_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No worker imports NumPy and SymPy in advance, which costs more than most tests do."""
    monkeypatch.setattr("retool_jax.sandbox.host.crew.NEEDED_S", 0.0)


@pytest.fixture(params=["process", "bubblewrap", "gvisor"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each back-end that works here."""
    if reason := LAUNCHERS[request.param].missing(SandboxConfig()):
        pytest.skip(f"{request.param}: {reason}")
    return request.param


class Box:
    """An open sandbox for tests without an event loop of their own."""

    def __init__(self, runner: asyncio.Runner, sandbox: Sandbox) -> None:
        self.runner, self.sandbox = runner, sandbox

    def run(self, *programs: str, **options) -> list[ToolResult]:
        """Results of programs that run side by side; `options` as for `Sandbox.run`."""

        async def gather() -> list[ToolResult]:
            return list(await asyncio.gather(*(self.sandbox.run(program, **options) for program in programs)))

        return self.runner.run(gather())


@pytest.fixture(scope="module", params=["process", "bubblewrap", "gvisor"])
def box(request: pytest.FixtureRequest) -> Iterator[Box]:
    """One sandbox of each back-end that works here, with two slots, for all tests of a file."""
    if reason := LAUNCHERS[request.param].missing(SandboxConfig()):
        pytest.skip(f"{request.param}: {reason}")
    with asyncio.Runner() as runner:
        opened = open_sandbox(SandboxConfig(backend=(request.param,), slots=2, probe_s=0))
        sandbox = runner.run(opened.__aenter__())
        try:
            yield Box(runner, sandbox)
        finally:
            runner.run(opened.__aexit__(None, None, None))


@pytest.fixture
def worker_pids() -> Callable[[Sandbox], list[int]]:
    """Outermost processes of all workers of a sandbox; workers that run something come first."""

    def pids(box: Sandbox) -> list[int]:
        crew = box.crew
        return [member.launched.pid for member in (*crew._own, *crew._lent, *crew._ready)]

    return pids


@pytest.fixture
def descendants() -> Callable[[int], set[int]]:
    """Live descendants of a process, as the host sees them."""
    return below


@pytest.fixture
def alive() -> Callable[[set[int]], set[int]]:
    """The given processes that still run after some time to end."""

    def left(pids: set[int]) -> set[int]:
        deadline = time.monotonic() + 30
        while still := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)
        return still

    return left


@asynccontextmanager
async def _serve(config: SandboxConfig, ceiling: Limits, token: str) -> AsyncIterator[tuple[str, Sandbox]]:
    import uvicorn

    from retool_jax.sandbox.remote.app import build_app

    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with open_sandbox(config) as box:
            app = build_app(box, ceiling, token)
            server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield f"http://127.0.0.1:{listener.getsockname()[1]}", box
            finally:
                server.should_exit = True
                await task


@pytest.fixture
def serve():
    """A server in this event loop: `async with serve(config) as (url, box)`."""
    pytest.importorskip("uvicorn", reason="the server needs uvicorn: pip install 'retool_jax[sandbox]'")
    default = SandboxConfig(backend=("process",), slots=1, probe_s=0)

    def start(config: SandboxConfig = default, ceiling: Limits | None = None, token: str = ""):
        return _serve(config, ceiling or Limits(wall_s=60), token)

    return start
