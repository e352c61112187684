"""The crew: workers are tested, replaced and kept in reserve, and starts fail."""

import asyncio
import signal
from dataclasses import replace

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.launch import process

from ..processes import kill, kill_whole, send
from ..programs import SLEEP, nap, until

PROCESS = SandboxConfig(backend=("process",), slots=1, probe_s=0)


def test_workers_are_replaced_by_calls_age_and_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.TEND_S", 0.05)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.MEMORY_CALLS", 1)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.MEMORY_S", 0)

    async def reasons(condition, calls: int, **config) -> dict[str, int]:
        async with open_sandbox(replace(PROCESS, **config)) as box:
            box.metrics.restarts.clear()
            for _ in range(calls):
                assert (await box.run("print(1)")).stdout == "1\n"
            await until(lambda: condition(box.metrics.restarts))
            return dict(box.metrics.restarts)

    assert asyncio.run(reasons(lambda seen: seen["calls"], 6, recycle_calls=3))["calls"] >= 1
    assert asyncio.run(reasons(lambda seen: seen["age"], 0, recycle_s=1))["age"] >= 1
    assert asyncio.run(reasons(lambda seen: seen["memory"], 4, recycle_memory_mb=1))["memory"] == 2


def test_memory_that_is_freed_late_costs_no_worker(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.MEMORY_CALLS", 1)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.MEMORY_S", 0)
    held = iter([900.0, 100.0, 900.0, 100.0])

    async def main() -> dict[str, int]:
        async with open_sandbox(PROCESS) as box:
            monkeypatch.setattr("retool_jax.sandbox.launch.worker.Worker.memory_mb", lambda _: next(held))
            for _ in range(4):
                await box.run("print(1)")
            return dict(box.metrics.restarts)

    assert asyncio.run(main()) == {}


def test_idle_workers_start_the_fork_servers_that_programs_ask_for(descendants, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.NEEDED_S", 600.0)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.TEND_S", 0.05)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.WARM_S", 0)

    async def main() -> tuple[int, int, ToolResult]:
        async with open_sandbox(PROCESS) as box:
            await until(lambda: box.crew.ready == 2)
            spare = box.crew._ready[0]
            before = len(descendants(spare.launched.pid))
            await box.run("import numpy")  # goes to the worker used last
            await until(lambda: box.crew.ready == 2 and "numpy" in spare.tiers)
            after = len(descendants(spare.launched.pid))
            result, _ = await spare.perform(Request("import numpy\nprint(numpy.eye(2).sum())"))
            return before, after, result

    before, after, result = asyncio.run(main())
    assert (after - before, result.stdout) == (1, "2.0\n")


def test_a_replacement_serves_once_it_runs_what_programs_ask_for(worker_pids, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.NEEDED_S", 600.0)

    async def main() -> tuple[list[set[str]], ToolResult, ToolResult]:
        async with open_sandbox(PROCESS) as box:
            await until(lambda: box.crew.ready == 2)
            await box.run("import numpy")
            old = set(box.crew._ready)
            kill_whole(worker_pids(box))
            light = await box.run("print(1)")
            new = [set(member.tiers) for member in box.crew._ready if member not in old]
            return new, light, await box.run("import numpy\nprint(2)")

    new, light, heavy = asyncio.run(main())
    assert new and all(tiers == {"base", "numpy"} for tiers in new), "one of two, or both where they are quick"
    assert (light.stdout, heavy.stdout) == ("1\n", "2\n")


@pytest.mark.parametrize("core_to_spare", [False, True])
def test_the_spare_is_not_started_beside_a_program_where_every_core_has_one(
    core_to_spare: bool, worker_pids, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.TEND_S", 0.05)

    async def main() -> None:
        async with open_sandbox(PROCESS) as box:
            await until(lambda: box.crew.ready == 2)
            box.crew._cores.enough = core_to_spare
            call = asyncio.create_task(box.run(SLEEP))
            await until(lambda: box.crew._lent)
            kill(box.crew._ready[0].launched.pid)
            await until(lambda: box.metrics.restarts["died idle"])
            if core_to_spare:
                await until(lambda: box.crew.ready == 1)
                assert not call.done()
            else:
                await asyncio.sleep(0.5)
                assert box.crew.ready == 0 and not box.crew._starting
            call.cancel()
            await until(lambda: box.crew.ready == 2)

    asyncio.run(main())


def test_idle_workers_are_tried_and_dead_ones_replaced(worker_pids, descendants, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.crew.TEND_S", 0.05)
    monkeypatch.setattr("retool_jax.sandbox.host.crew.PROBE_WALL_S", 0.2)
    monkeypatch.setattr("retool_jax.sandbox.host.member.OVERTIME_S", 0.2)

    async def main() -> tuple[dict, ToolResult]:
        async with open_sandbox(replace(PROCESS, probe_s=0.2)) as box:
            await until(lambda: box.crew.ready == 2)
            stopped, killed = worker_pids(box)
            send(signal.SIGSTOP, stopped, *descendants(stopped))
            kill(killed)
            await until(lambda: {"probe", "died idle"} <= set(box.metrics.restarts))
            await until(lambda: box.crew.ready == 2)
            return box.metrics.restarts, await box.run("print(1)")

    restarts, result = asyncio.run(main())
    assert (result.stdout, result.attempts) == ("1\n", 1)
    assert restarts["died idle"] == 1


def test_a_spare_takes_over_without_a_start(worker_pids, monkeypatch: pytest.MonkeyPatch):
    async def never(config: SandboxConfig, memory_mb: int) -> None:
        await asyncio.sleep(3600)

    async def main() -> ToolResult:
        async with open_sandbox(PROCESS) as box:
            await until(lambda: box.crew.ready == 2)
            monkeypatch.setattr(process, "launch", never)
            call = asyncio.create_task(box.run(nap(1.5)))
            await until(lambda: box.crew._lent)
            kill(worker_pids(box)[0])
            return await asyncio.wait_for(call, 60)

    result = asyncio.run(main())
    assert (result.stdout, result.attempts) == ("ok\n", 2)


@pytest.mark.parametrize("kind", [OSError, RuntimeError])  # a fault of the machine, and an unexpected error
def test_starts_that_fail_open_the_breaker_and_one_that_works_closes_it(kind, worker_pids, monkeypatch):
    launch = process.launch
    broken = True

    async def fail(config: SandboxConfig, memory_mb: int):
        if broken:
            raise kind("no more processes")
        return await launch(config, memory_mb)

    async def main() -> tuple[ToolResult, ToolResult, ToolResult]:
        nonlocal broken
        async with open_sandbox(PROCESS) as box:
            await until(lambda: box.crew.ready == 2)
            monkeypatch.setattr(process, "launch", fail)
            kill_whole(worker_pids(box))
            first = await box.run("print(1)")
            quick = await asyncio.wait_for(box.run("print(1)"), 10)
            broken = False
            await until(lambda: box.crew.ready)
            return first, quick, await box.run("print(1)")

    first, quick, after = asyncio.run(main())
    assert (first.status, quick.status) == ("infra_error", "infra_error")
    assert "no more processes" in first.message
    assert "5 starts in a row failed" in quick.message and quick.attempts == 1
    assert (after.status, after.attempts) == ("success", 1)


def test_a_large_call_gets_a_worker_of_its_own():
    async def main() -> tuple[list[ToolResult], dict]:
        async with open_sandbox(replace(PROCESS, limits=Limits(memory_mb=256))) as box:
            code = "x = bytearray(300 << 20)\nprint(len(x) >> 20)"
            results = [await box.run(code), await box.run(code, limits=Limits(memory_mb=1024)), await box.run("1")]
            return results, box.metrics.restarts

    results, restarts = asyncio.run(main())
    assert [(r.status, r.stdout) for r in results] == [("oom", ""), ("success", "300\n"), ("success", "1\n")]
    assert restarts == {"large call": 1}
