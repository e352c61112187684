"""Whose fault a lost worker is: a program cannot get itself dropped, and it is never blamed for causes outside."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.host.member import Member
from retool_jax.sandbox.launch import bubblewrap, cgroup

from ..processes import below, kill, send
from ..programs import SLEEP, until

OVERTIME = "retool_jax.sandbox.host.member.OVERTIME_S"
LIMITS = Limits(wall_s=3, memory_mb=256, processes=24)
PATIENT = replace(LIMITS, wall_s=30)
# Busy enough to keep others from working where there is little, but no load for the machine of a test.
BUSY = """
import time
while True:
    end = time.monotonic() + 0.01
    while time.monotonic() < end:
        pass
    time.sleep(0.03)
"""
BOMB = r"""
import ctypes, os, time
ctypes.CDLL(None).prctl(15, b"\xff) T", 0, 0, 0)  # a process name that is not text, for readers of /proc
while True:
    try:
        os.fork()
    except OSError:
        time.sleep(PAUSE)
"""
QUIET_BOMB, LOUD_BOMB = BOMB.replace("PAUSE", "1"), BOMB.replace("PAUSE", "0")
GREEDY = """
import os, time
for _ in range(8):
    if not os.fork():
        x = bytearray(120 << 20)
        for at in range(0, len(x), 4096):
            x[at] = at >> 12 & 255
        time.sleep(30)
        os._exit(0)
os.wait()  # until the first child was killed
os._exit(1)
"""


Meddle = Callable[[list[int]], Awaitable[None]]


class Outcome(NamedTuple):
    """How a program ended, the number of lost workers by reason, and the counted faults."""

    result: ToolResult
    restarts: dict[str, int]
    faults: dict[str, int]


def once(backend: str, **changes) -> SandboxConfig:
    """A back-end whose calls are tried only once, like cells of a session."""
    return replace(SandboxConfig((backend,), slots=1, retries=0, probe_s=0, limits=LIMITS), **changes)


async def busy_worker(box: Sandbox) -> Member:
    """The worker that runs a call, or the second cell of its session."""

    def busy() -> list[Member]:
        return [*box.crew._lent, *(member for member in box.crew._own if member.calls > 1)]

    await until(busy)
    await asyncio.sleep(0.2)  # until then the program has begun
    return busy()[0]


async def play(box: Sandbox, way: str, code: str, limits: Limits = LIMITS, meddle: Meddle | None = None) -> Outcome:
    """Run some code as a call or as the second cell of a session; await `meddle` while it runs.

    It gets the worker's processes without the program's, the outermost first.
    """
    await box.run("print(1)", limits=PATIENT)
    async with box.session() as session:
        if way == "session":
            await session.run("x = 1", limits=PATIENT)
        box.metrics.restarts.clear()
        box.metrics.faults.clear()
        call = asyncio.create_task((session if way == "session" else box).run(code, limits=limits))
        if meddle is not None:
            launched = (await busy_worker(box)).launched
            await meddle([launched.pid, *sorted(launched.machinery.keys() - {launched.pid})])
        result = await call
        outcome = Outcome(result, dict(box.metrics.restarts), dict(box.metrics.faults))
        if way == "session":
            after = await session.run("print('x' in globals())", limits=PATIENT)
            if result.status == "infra_error":
                assert after.status == "infra_error", "its variables were lost by nobody's fault: nothing more is run"
            elif result.status != "success":
                assert (after.status, after.stdout) == ("success", "False\n") and "interpreter ended" in result.message
    return outcome


def outcomes(config: SandboxConfig, *plays: tuple) -> list[Outcome]:
    """The results of several `play` calls in one sandbox."""

    async def main() -> list[Outcome]:
        async with open_sandbox(config) as box:
            return [await play(box, *each) for each in plays]

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def patient_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that also runs other tests, the host may be late, and programs get little processor time."""
    monkeypatch.setattr("retool_jax.sandbox.host.member.LATE_S", 20.0)
    monkeypatch.setattr("retool_jax.sandbox.launch.worker.BUSY_SHARE", 0.03)
    monkeypatch.setattr("retool_jax.sandbox.launch.worker.LOOK_S", 1.0)


@pytest.fixture
def grouped(backend: str) -> str:
    """A back-end with a control group, by which the host can tell how a worker died."""
    if cgroup.memory_folder() is None:
        pytest.skip("no memory control group can be made here")
    return backend


with_group = pytest.mark.parametrize("backend", ["bubblewrap", "gvisor"], indirect=True)


def test_a_program_that_keeps_its_worker_from_answering_is_to_blame(backend: str, monkeypatch: pytest.MonkeyPatch):
    """The host gives up the worker while the program runs, as if the supervisor got no answer through."""
    # The host looks for a second, three seconds after the start: the program runs, and its own limit has not ended it.
    monkeypatch.setattr(OVERTIME, -5.0)
    limits = replace(LIMITS, wall_s=8)
    programs = ("session", QUIET_BOMB), ("call", QUIET_BOMB), ("session", BUSY)  # a call is not tried again, nor a cell
    plays = [(*program, limits) for program in programs]
    for outcome in outcomes(once(backend, retries=2), *plays):
        assert (outcome.result.status, outcome.result.attempts, outcome.faults) == ("timeout", 1, {}), outcome
        assert outcome.restarts.get("overrun") == 1, outcome


def test_an_answer_that_comes_while_the_host_looks_counts(backend: str, monkeypatch: pytest.MonkeyPatch):
    """The host gives up after a second, and the program ends while the host looks for the reason."""
    monkeypatch.setattr(OVERTIME, -29.0)
    monkeypatch.setattr("retool_jax.sandbox.launch.worker.LOOK_S", 20.0)
    code = "import time\ntime.sleep(2)\nprint('ended')"
    (outcome,) = outcomes(once(backend), ("session", code, PATIENT))
    assert (outcome.result.status, outcome.result.stdout) == ("success", "ended\n"), outcome
    assert (outcome.restarts, outcome.faults) == ({}, {})


@with_group
def test_a_session_whose_worker_goes_down_at_its_memory_limit_ran_out_of_memory(grouped: str):
    (outcome,) = outcomes(once(grouped), ("session", GREEDY, PATIENT))
    assert (outcome.result.status, outcome.result.attempts, outcome.faults) == ("oom", 1, {}), outcome


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can slow the supervisor of another user's programs down")
def test_a_supervisor_that_starves_beside_a_bomb_is_the_bombs_doing(monkeypatch: pytest.MonkeyPatch):
    if reason := bubblewrap.missing(SandboxConfig()):
        pytest.skip(reason)
    monkeypatch.setattr(OVERTIME, 0.0)

    async def starve(pids: list[int]) -> None:
        supervisor = max(pids[1:], key=lambda pid: len(below(pid)))
        os.sched_setscheduler(supervisor, os.SCHED_IDLE, os.sched_param(0))

    (outcome,) = outcomes(once("bubblewrap"), ("session", LOUD_BOMB, LIMITS, starve))
    assert (outcome.result.status, outcome.result.attempts, outcome.faults) == ("timeout", 1, {}), outcome


def test_a_worker_that_was_stopped_from_outside_is_nobodys_fault(backend: str, monkeypatch: pytest.MonkeyPatch):
    """Its program stays busy all the time, because nobody ends it."""
    monkeypatch.setattr(OVERTIME, 0.3)

    async def stop(pids: list[int]) -> None:
        send(signal.SIGSTOP, *pids)

    for outcome in outcomes(once(backend), ("call", BUSY, LIMITS, stop), ("session", BUSY, LIMITS, stop)):
        assert (outcome.result.status, outcome.restarts.get("stopped")) == ("infra_error", 1), outcome
        assert outcome.faults == {"stopped": 1}


def test_a_worker_that_was_killed_from_outside_is_nobodys_fault(backend: str):
    """Each of its processes, except those in which gVisor's kernel runs the programs (they have no command line): the
    host cannot tell their end from a fault of that kernel."""
    index, parts = 0, 1

    async def kill_one(pids: list[int]) -> None:
        nonlocal parts
        named = [pid for pid in pids if Path(f"/proc/{pid}/cmdline").read_bytes()]
        parts = len(named)
        kill(named[index])

    async def main() -> list[tuple[int, Outcome]]:
        nonlocal index
        found = []
        async with open_sandbox(once(backend)) as box:
            while index < parts:
                way = ("call", "session")[index % 2]
                found.append((index, await play(box, way, SLEEP, PATIENT, kill_one)))
                index += 1
        return found

    found = asyncio.run(main())
    assert len(found) >= 3
    assert {outcome.result.status for _, outcome in found} == {"infra_error"}, "\n".join(map(str, found))


@with_group
def test_a_worker_that_broke_without_a_signal_from_outside_is_its_programs_doing_at_the_last_try(grouped: str):
    async def crash(pids: list[int]) -> None:
        send(signal.SIGSEGV, pids[0])

    short = "import time\ntime.sleep(4)\nprint('ok')"
    plays = ("session", SLEEP, PATIENT, crash), ("call", short, PATIENT, crash)
    cell, call = outcomes(once(grouped, retries=1), *plays)
    assert (cell.result.status, cell.restarts.get("broken"), cell.faults) == ("user_error", 1, {}), cell
    assert "killed the sandbox" in cell.result.message
    assert (call.result.status, call.result.stdout, call.result.attempts) == ("success", "ok\n", 2), call


@pytest.mark.parametrize("ends", [True, False])
def test_an_owner_that_stood_still_blames_nobody(monkeypatch: pytest.MonkeyPatch, ends: bool):
    """If an answer has come meanwhile, it is found; if not, the reason is unknown."""
    limits = replace(LIMITS, wall_s=9)
    monkeypatch.setattr(OVERTIME, 2.0 - limits.wall_s)
    monkeypatch.setattr("retool_jax.sandbox.host.member.LATE_S", 1.0)

    async def stand_still(_: list[int]) -> None:
        time.sleep(4)

    short = "import time\nend = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass\nprint('ok')"
    (outcome,) = outcomes(once("process"), ("call", short if ends else BUSY, limits, stand_still))
    expected = ("success", "ok\n", {}) if ends else ("infra_error", "", {"hung": 1})
    assert (outcome.result.status, outcome.result.stdout, outcome.restarts) == expected, outcome


def test_a_fork_server_that_has_to_start_first_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(OVERTIME, -2.95)

    async def main() -> list[ToolResult]:
        async with open_sandbox(once("process")) as box:
            return [await box.run("import numpy\nprint(1)"), await box.run("import time\ntime.sleep(2.5)")]

    cold, warm = asyncio.run(main())
    assert (cold.status, cold.stdout) == ("success", "1\n")
    assert warm.status == "infra_error", "0.05 s are little, and a program that sleeps keeps nobody from answering"
