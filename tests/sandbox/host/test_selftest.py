"""The self-test: a back-end that breaks a promise is refused, and the test leaves nothing behind."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.host.selftest import CANARY_FOLDERS, check_promises
from retool_jax.sandbox.launch import process


class Bare:
    """A sandbox that isolates nothing. It runs only the self-test's own program here."""

    config = SandboxConfig()

    async def run(self, code: str, **_: object) -> ToolResult:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-c", code), stdout=asyncio.subprocess.PIPE, env=os.environ | {"TOKEN": "x"}
        )
        output, _ = await child.communicate()
        return ToolResult("success" if child.returncode == 0 else "user_error", stdout=output.decode())


def canaries() -> list[Path]:
    """Folders that a self-test of this process has made; other sandboxes on the machine make theirs."""
    return [path for name in CANARY_FOLDERS for path in Path(name).expanduser().glob(f".canary-{os.getpid()}-*")]


@pytest.mark.parametrize(
    ("promise", "word"),
    [
        ("environment", "it sees .*'TOKEN'"),
        ("files", "it read a file of the host"),
        ("network", "it reached a socket of the host"),
        ("processes", "it sees processes of the host"),
        ("memory", "with 64 MB it took twice that and ended as success"),
    ],
)
def test_each_promise_is_tried(promise: str, word: str):
    asyncio.run(check_promises(Bare(), set()))
    with pytest.raises(UserError, match=f"promises '{promise}' and does not hold it here: {word}"):
        asyncio.run(check_promises(Bare(), {promise}))
    assert not canaries()


def test_writing_to_the_host_breaks_the_promise_too(monkeypatch: pytest.MonkeyPatch):
    from retool_jax.sandbox.host import selftest

    monkeypatch.setattr(selftest, "_PROGRAM", selftest._PROGRAM.replace('found["files"].append', "len"))
    with pytest.raises(UserError, match="it wrote to a folder of the host"):
        asyncio.run(check_promises(Bare(), {"files"}))


def test_a_sandbox_in_which_nothing_runs_is_refused():
    class Broken(Bare):
        async def run(self, code: str, **_: object) -> ToolResult:
            return ToolResult("infra_error", message="no worker started")

    with pytest.raises(UserError, match="ended as infra_error: no worker started"):
        asyncio.run(check_promises(Broken(), set()))


def test_plain_processes_could_not_promise_the_host_s_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "PROMISES", process.PROMISES | {"files"})

    async def main() -> None:
        async with open_sandbox(SandboxConfig(backend=("process",), slots=1)):
            pass

    with pytest.raises(UserError, match="promises 'files' and does not hold it here"):
        asyncio.run(main())
    assert not canaries()


def test_every_backend_of_this_machine_passes(backend: str):
    async def main() -> ToolResult:
        async with open_sandbox(SandboxConfig(backend=(backend,), slots=1)) as box:
            return await box.run("print(1)", limits=Limits(wall_s=5))

    assert asyncio.run(main()).stdout == "1\n"
    assert not canaries()
