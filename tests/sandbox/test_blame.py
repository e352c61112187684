"""Who lost a worker: a program cannot have itself dropped, and what came from outside is never held against it."""

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, cgroup, open_sandbox
from retool_jax.sandbox.member import Member
from retool_jax.sandbox.pool import LAUNCHERS

from .processes import kill, send

OVERTIME = "retool_jax.sandbox.member.OVERTIME_S"
LIMITS = Limits(wall_s=1.5, memory_mb=256)
ONCE = SandboxConfig(slots=1, retries=0, probe_s=0, limits=LIMITS)
NAP = "import time\ntime.sleep(0.6)\nprint('ok')"
SPIN = "while True: pass"
BOMBS = {
    "forks": r"""
import ctypes, os
ctypes.CDLL(None).prctl(15, b"\xff) T", 0, 0, 0)  # a name that is no text, for those who look
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    "threads": """
import threading
threading.stack_size(65536)
def spin():
    while True:
        pass
while True:
    try:
        threading.Thread(target=spin).start()
    except RuntimeError:
        pass
""",
    "memory": """
import os
for _ in range(8):
    if not os.fork():
        break
x = bytearray(120 << 20)
while True:
    for at in range(0, len(x), 4096):
        x[at] = at >> 12 & 255
""",
}


async def until(condition, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def busy_worker(box: Sandbox) -> Member:
    """The one that runs a call, or the second cell of the session that it belongs to."""

    def busy() -> list[Member]:
        return [*box.crew._lent, *(member for member in box.crew._own if member.calls > 1)]

    await until(busy)
    return busy()[0]


async def play(box: Sandbox, way: str, code: str, meddle=None) -> tuple[ToolResult, dict, dict]:
    """How some code ends, as a call or as the second cell of a session, with the workers that it lost and the faults
    that were counted; `meddle(member)` is awaited while it runs."""
    patient = replace(LIMITS, wall_s=30)
    await box.run("print(1)", limits=patient)
    async with box.session() as session:
        if way == "session":
            await session.run("x = 1", limits=patient)
        box.metrics.restarts.clear()
        box.metrics.faults.clear()
        call = asyncio.create_task((session if way == "session" else box).run(code, limits=LIMITS))
        if meddle is not None:
            member = await busy_worker(box)
            await asyncio.sleep(0.2)
            await meddle(member)
        result = await call
        restarts, faults = dict(box.metrics.restarts), dict(box.metrics.faults)
        if way == "session":
            after = await session.run("print('x' in globals())", limits=patient)
            if result.status == "infra_error":
                assert after.status == "infra_error", "its variables were lost by nobody's fault: nothing more is run"
            elif result.status != "success":
                assert (after.status, after.stdout) == ("success", "False\n") and "interpreter ended" in result.message
    return result, restarts, faults


def both_ways(config: SandboxConfig, code: str, meddle=None) -> list[tuple[ToolResult, dict, dict]]:
    """What `play` says of a call and of a session."""

    async def main() -> list[tuple[ToolResult, dict, dict]]:
        async with open_sandbox(config) as box:
            return [await play(box, way, code, meddle) for way in ("call", "session")]

    return asyncio.run(main())


def on(backend: str, config: SandboxConfig = ONCE, **changes) -> SandboxConfig:
    return replace(config, backend=(backend,), **changes)


def demand_group(backend: str) -> None:
    """Skip where the host cannot tell how a worker died."""
    if backend == "process" or cgroup.place() is None:
        pytest.skip(f"{backend} has no control group here")


@pytest.mark.parametrize("name", BOMBS)
def test_a_program_that_keeps_its_worker_from_answering_is_to_blame(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
):
    """The host gives the worker up while the program is at it, as if the supervisor did not get through to it."""
    monkeypatch.setattr(OVERTIME, -0.5)
    for result, restarts, faults in both_ways(on(backend), BOMBS[name]):
        assert result.status in (("oom", "timeout") if name == "memory" else ("timeout",)), result
        assert (result.attempts, faults) == (1, {})
        assert result.status == "oom" or restarts.get("overrun") == 1, restarts


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can slow the supervisor of another user's programs down")
@pytest.mark.parametrize("name", ["forks", "threads"])
@pytest.mark.parametrize("backend", ["process", "bubblewrap"])
def test_a_supervisor_that_starves_beside_a_bomb_is_the_bombs_doing(
    backend: str, name: str, descendants, monkeypatch: pytest.MonkeyPatch
):
    if reason := LAUNCHERS[backend].missing(SandboxConfig()):
        pytest.skip(f"{backend}: {reason}")
    monkeypatch.setattr(OVERTIME, 0.0)

    async def starve(member: Member) -> None:
        children = {pid: descendants(pid) for pid in descendants(member.launched.pid)}
        supervisor = max(children, key=lambda pid: len(children[pid]))
        os.sched_setscheduler(supervisor, os.SCHED_IDLE, os.sched_param(0))

    for result, _, faults in both_ways(on(backend), BOMBS[name], starve):
        assert (result.status, result.attempts, faults) == ("timeout", 1, {}), result


def test_a_worker_that_was_stopped_from_outside_is_nobodys_fault(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Its program goes on all the while, as busy as can be, because nobody ends it."""
    monkeypatch.setattr(OVERTIME, 0.3)

    async def stop(member: Member) -> None:
        send(signal.SIGSTOP, *member.launched._machinery)

    for result, restarts, faults in both_ways(on(backend), SPIN, stop):
        assert (result.status, restarts.get("stopped"), faults) == ("infra_error", 1, {"stopped": 1}), result


def test_a_worker_that_was_killed_from_outside_is_nobodys_fault(backend: str):
    """Whichever of its processes it was, but for those in which gVisor's kernel runs what is inside it (they have no
    command line): the host cannot tell their end from a fault of that kernel."""
    index = 0

    def processes(member: Member) -> list[int]:
        return [pid for pid in sorted(member.launched._machinery) if Path(f"/proc/{pid}/cmdline").read_bytes()]

    async def kill_one(member: Member) -> None:
        kill(processes(member)[index])

    async def main() -> list[tuple[int, str, ToolResult, dict]]:
        nonlocal index
        found = []
        async with open_sandbox(on(backend)) as box:
            for index in range(len(processes(box.crew._ready[-1]))):
                for way in ("call", "session"):
                    result, _, faults = await play(box, way, NAP, kill_one)
                    found.append((index, way, result, faults))
        return found

    found = asyncio.run(main())
    assert len(found) >= 6
    wrong = [each for each in found if each[2].status not in ("infra_error", "success")]
    assert not wrong, "\n".join(map(str, wrong))


def test_a_worker_that_broke_under_a_program_without_a_signal_from_outside_is_that_programs_doing(backend: str):
    if backend == "process" or cgroup.place() is None:
        pytest.skip(f"{backend} has no control group here: the host cannot tell how a worker died")

    async def crash(member: Member) -> None:
        send(signal.SIGSEGV, member.launched.pid)

    for result, restarts, faults in both_ways(on(backend), NAP, crash):
        assert (result.status, restarts.get("broken"), faults) == ("user_error", 1, {}), result
        assert "killed the sandbox" in result.message
    result, _, _ = both_ways(on(backend, retries=1), NAP, crash)[0]
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 2), "it is given another try"


def test_an_owner_that_stood_still_blames_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OVERTIME, -0.5)

    async def stand_still(member: Member) -> None:
        monkeypatch.setattr(OVERTIME, 10.0)
        time.sleep(3)

    busy = "import time\nend = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass\nprint('ok')"

    async def main() -> tuple[ToolResult, dict, dict]:
        async with open_sandbox(on("process", retries=1)) as box:
            return await play(box, "call", busy, stand_still)

    result, restarts, _ = asyncio.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 2)
    assert restarts["hung"] == 1


def test_a_fork_server_that_has_to_start_first_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OVERTIME, -1.45)

    async def main() -> list[ToolResult]:
        async with open_sandbox(on("process")) as box:
            return [await box.run("import numpy\nprint(1)"), await box.run("import time\ntime.sleep(0.3)")]

    cold, warm = asyncio.run(main())
    assert (cold.status, cold.stdout) == ("success", "1\n")
    assert warm.status == "infra_error", "0.05 s are little, and a program that sleeps keeps nobody from answering"
