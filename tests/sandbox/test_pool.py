"""The pool: queue, retries, cancellation, closing, configuration."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from retool_jax.errors import UserError
from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox

SLEEP = "import time\ntime.sleep(30)"


def worker_pids(box: Sandbox) -> list[int]:
    return [slot.worker.process.pid for slot in box._slots if slot.worker is not None]


def descendants(pid: int) -> set[int]:
    """Live processes below `pid`, as the host sees them."""
    try:
        children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except OSError:
        return set()
    return children.union(*map(descendants, children))


def alive(pids: set[int]) -> set[int]:
    """Those of `pids` that still run, given a moment to go."""
    deadline = time.monotonic() + 2
    while left := {pid for pid in pids if Path(f"/proc/{pid}").exists()}:
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return left


def test_killed_worker_is_replaced_and_the_call_repeated():
    async def main() -> tuple[ToolResult, ToolResult]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            call = asyncio.create_task(box.run("import time\ntime.sleep(0.5)\nprint('ok')"))
            await asyncio.sleep(0.15)
            os.kill(worker_pids(box)[0], signal.SIGKILL)
            return await call, await box.run("print(1)")

    first, second = asyncio.run(main())
    assert (first.status, first.stdout, first.attempts) == ("success", "ok\n", 2)
    assert (second.status, second.attempts) == ("success", 1)


def test_a_worker_that_dies_every_time_is_an_infra_error_after_the_retries():
    async def main() -> ToolResult:
        async with open_sandbox(SandboxConfig(slots=1, retries=1)) as box:
            call = asyncio.create_task(box.run(SLEEP))
            killed: set[int] = set()
            while not call.done():
                for pid in set(worker_pids(box)) - killed:
                    await asyncio.sleep(0.1)
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
                await asyncio.sleep(0.01)
            return await call

    result = asyncio.run(main())
    assert (result.status, result.attempts, result.return_code) == ("infra_error", 2, None)
    assert "died" in result.message


def test_hung_worker_is_noticed_from_outside(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.pool.OVERTIME_S", 0.3)

    async def main() -> tuple[ToolResult, set[int]]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            call = asyncio.create_task(box.run("import time\ntime.sleep(0.2)\nprint('ok')", limits=Limits(wall_s=0.4)))
            await asyncio.sleep(0.1)
            pid = worker_pids(box)[0]
            tree = {pid} | descendants(pid)
            for process in tree:
                os.kill(process, signal.SIGSTOP)
            result = await call
        return result, tree

    result, tree = asyncio.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 2)
    assert not alive(tree)


def test_program_faults_are_never_repeated():
    async def main() -> list[ToolResult]:
        async with open_sandbox(SandboxConfig(slots=2)) as box:
            programs = ("1 / 0", SLEEP, "import os\nos.kill(os.getpid(), 9)")
            return list(await asyncio.gather(*(box.run(code, limits=Limits(wall_s=0.3)) for code in programs)))

    results = asyncio.run(main())
    assert [(r.status, r.attempts) for r in results] == [("user_error", 1), ("timeout", 1), ("user_error", 1)]


def test_full_queue_refuses_and_waiting_calls_are_served_in_order():
    async def main() -> tuple[list[ToolResult], list[int]]:
        finished: list[int] = []

        async def numbered(box: Sandbox, i: int) -> ToolResult:
            result = await box.run(f"import time\ntime.sleep(0.1)\nprint({i})")
            finished.append(i)
            return result

        async with open_sandbox(SandboxConfig(slots=1, queue_limit=2)) as box:
            return list(await asyncio.gather(*(numbered(box, i) for i in range(5)))), finished

    results, finished = asyncio.run(main())
    assert [r.status for r in results] == ["success"] * 3 + ["infra_error"] * 2
    assert all("overloaded" in r.message and r.attempts == 0 for r in results[3:])
    assert [i for i in finished if i < 3] == [0, 1, 2]


def test_cancelling_the_caller_kills_the_program_and_frees_the_slot():
    async def main() -> tuple[set[int], ToolResult]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            running = asyncio.create_task(box.run(SLEEP))
            waiting = asyncio.create_task(box.run(SLEEP))
            await asyncio.sleep(0.2)
            pid = worker_pids(box)[0]
            tree = {pid} | descendants(pid)
            assert len(tree) >= 2
            for task in (waiting, running):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            result = await asyncio.wait_for(box.run("print(1)"), 5)
            return await asyncio.to_thread(alive, tree), result

    left, result = asyncio.run(main())
    assert not left
    assert (result.status, result.stdout, result.attempts) == ("success", "1\n", 1)


def test_closing_answers_open_calls_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    before = descendants(os.getpid())  # other tests' workers, for one
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tmp_path.chmod(0o711)

    async def main() -> tuple[list[ToolResult], set[int]]:
        async with open_sandbox(SandboxConfig(slots=2)) as box:
            calls = [asyncio.create_task(box.run(SLEEP)) for _ in range(4)]
            await asyncio.sleep(0.2)
            tree = set(worker_pids(box)).union(*map(descendants, worker_pids(box)))
        with pytest.raises(RuntimeError, match="closed"):
            await box.run("print(1)")
        return list(await asyncio.gather(*calls)), tree

    results, tree = asyncio.run(main())
    assert [r.status for r in results] == ["cancelled"] * 4
    assert len(tree) >= 4
    assert not alive(tree)
    assert descendants(os.getpid()) <= before
    assert list(tmp_path.iterdir()) == []


def test_requests_out_of_bounds_are_not_run():
    async def main() -> list[ToolResult]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            return [
                await box.run("#" * ((2 << 20) + 1)),
                await box.run("print('a\0b')"),
                await box.run("print(1)", stdin="x" * ((8 << 20) + 1)),
                await box.run("#" * (2 << 20)),
                await box.run("import sys\nlen(sys.stdin.read())", stdin="x" * (8 << 20)),
                await box.run("print('\ud800')"),
            ]

    *refused, long_code, long_stdin, surrogate = asyncio.run(main())
    assert [(r.status, r.attempts) for r in refused] == [("rejected", 0)] * 3
    assert ["2097152" in refused[0].message, "NUL" in refused[1].message, "8388608" in refused[2].message] == [True] * 3
    assert (long_code.status, long_stdin.stdout) == ("success", "8388608\n")
    assert (surrogate.status, surrogate.attempts) == ("user_error", 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SandboxConfig(slots=0), "sandbox.slots is 0; it must lie between 1"),
        (lambda: SandboxConfig(backend=()), "sandbox.backend is empty"),
        (lambda: SandboxConfig(backend="process"), "write a list"),
        (lambda: Limits(wall_s=0), "limits.wall_s is 0; it must lie between"),
        (lambda: Limits(wall_s=float("nan")), "limits.wall_s is nan"),
        (lambda: Limits(raw_output_bytes=1000), "limits.raw_output_bytes is 1000"),
    ],
)
def test_bad_values_are_named(make, words: str):
    with pytest.raises(UserError, match=words):
        make()


def test_unknown_backend_names_those_that_exist():
    async def main() -> None:
        async with open_sandbox(SandboxConfig(backend=("process", "gvisr"))):
            pass

    with pytest.raises(UserError, match="'gvisr'; there is process"):
        asyncio.run(main())


def test_a_backend_that_fails_its_self_test_is_refused(monkeypatch: pytest.MonkeyPatch):
    before = descendants(os.getpid())  # other tests' workers, for one
    leaky = {"PATH": "/usr/bin:/bin", "TOKEN": "x", "LANG": "C.UTF-8"}

    async def main() -> None:
        async with open_sandbox(SandboxConfig(slots=1)):
            pass

    from retool_jax.sandbox import process

    original = process.launch

    async def launch():
        monkeypatch.setattr(process, "ENVIRONMENT", leaky)
        worker = await original()
        monkeypatch.undo()
        return worker

    monkeypatch.setattr(process, "launch", launch)
    with pytest.raises(UserError, match="self-test"):
        asyncio.run(main())
    assert descendants(os.getpid()) <= before
