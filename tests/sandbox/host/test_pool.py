"""The pool: queue, retries, blame, cancellation, closing."""

import asyncio
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox
from retool_jax.sandbox.launch import bubblewrap, cgroup
from retool_jax.sandbox.launch.launchers import LAUNCHERS

from ..processes import kill, send
from ..programs import SLEEP, nap, until

PROCESS = SandboxConfig(backend=("process",), slots=1, probe_s=0)


async def kill_each_worker_of(call: asyncio.Task, box: Sandbox, worker_pids) -> None:
    """Kill every worker that gets this call, until the call ends."""
    killed: set[int] = set()
    while not call.done():
        busy = {member.launched.pid for member in box.crew._lent} - killed
        if busy:
            await asyncio.sleep(0.1)
            kill(*busy)
            killed |= busy
        await asyncio.sleep(0.01)


def test_programs_run_and_the_sandbox_says_what_it_is(box):
    results = box.run("print(2 + 2)", "6 * 7", "import numpy\nprint(numpy.eye(2).sum())", "1 / 0")
    assert [r.stdout for r in results] == ["4\n", "42\n", "2.0\n", ""]
    assert [r.status for r in results] == ["success"] * 3 + ["user_error"]
    backend = box.sandbox.backend
    assert all((r.backend, r.attempts) == (backend, 1) and r.queue_s < 30 and r.wall_s < 10 for r in results)
    assert box.sandbox.description.startswith(f"{backend}:")


def test_files_go_in_and_come_out(box):
    code = (
        "import os\n"
        "data = open('in/a.bin', 'rb').read()\n"
        "open('out.bin', 'wb').write(data[::-1])\n"
        "os.symlink('/etc/passwd', 'link')\n"
        "os.mkdir('folder')\n"
        "file = open('open.txt', 'w')\n"
        "file.write('never closed')"
    )
    fetch = ("out.bin", "open.txt", "missing", "link", "folder", "in/a.bin")
    (done,) = box.run(code, files={"in/a.bin": b"\x00\xff1"}, fetch=fetch)
    (refused,) = box.run("print(1)", fetch=["../x"])
    files = {"out.bin": b"1\xff\x00", "open.txt": b"never closed", "in/a.bin": b"\x00\xff1"}
    assert (done.status, done.files) == ("success", files)
    assert (refused.status, refused.attempts) == ("rejected", 0)
    assert "'..'" in refused.message


def test_killed_worker_is_replaced_and_the_call_repeated(box, worker_pids):
    sandbox = box.sandbox

    async def main() -> tuple[ToolResult, ToolResult]:
        call = asyncio.create_task(sandbox.run(nap(2.5)))
        await until(lambda: sandbox.crew._lent)
        await asyncio.sleep(0.15)
        kill(worker_pids(sandbox)[0])
        return await call, await sandbox.run("print(1)")

    first, second = box.runner.run(main())
    assert (first.status, first.stdout, first.attempts) == ("success", "ok\n", 2)
    assert (second.status, second.attempts) == ("success", 1)


def test_a_program_that_takes_its_worker_down_twice_is_blamed(worker_pids):
    async def main() -> tuple[ToolResult, dict]:
        async with open_sandbox(PROCESS) as box:
            call = asyncio.create_task(box.run(SLEEP))
            await kill_each_worker_of(call, box, worker_pids)
            return await call, box.metrics.restarts

    result, restarts = asyncio.run(main())
    assert (result.status, result.attempts, result.return_code, result.signal) == ("user_error", 2, -9, 9)
    assert "killed the sandbox" in result.message
    assert restarts == {"died": 2}


def test_where_workers_die_by_themselves_two_losses_prove_nothing(worker_pids):
    async def main() -> tuple[ToolResult, ToolResult]:
        async with open_sandbox(PROCESS) as box:
            innocent = asyncio.create_task(box.run(nap(2)))
            await until(lambda: box.crew._lent)
            kill(worker_pids(box)[0])
            call = asyncio.create_task(box.run(SLEEP))
            done = await innocent
            await kill_each_worker_of(call, box, worker_pids)
            return done, await call

    innocent, blamed = asyncio.run(main())
    assert (innocent.status, innocent.attempts) == ("success", 2)
    assert (blamed.status, blamed.attempts) == ("user_error", 3)


@pytest.mark.skipif(cgroup.memory_folder() is None, reason="no memory control group can be made here")
@pytest.mark.parametrize("role", ["outermost", "all"])
@pytest.mark.parametrize("name", ["bubblewrap", "gvisor"])
def test_what_no_program_can_have_done_is_not_blamed_on_one(name: str, role: str, worker_pids, descendants):
    if reason := LAUNCHERS[name].missing(SandboxConfig()):
        pytest.skip(f"{name}: {reason}")

    async def main() -> tuple[ToolResult, dict[str, int]]:
        async with open_sandbox(SandboxConfig(backend=(name,), slots=1, probe_s=0)) as box:
            call = asyncio.create_task(box.run("import time\ntime.sleep(1.5)\nprint('ok')"))
            for _ in range(2):
                await until(lambda: box.crew._lent)
                await asyncio.sleep(0.1)
                (member,) = box.crew._lent
                inner = descendants(member.launched.pid) if role == "all" else set()
                send(signal.SIGSTOP, *inner, member.launched.pid)  # so that none can react to the death of another
                kill(*inner, member.launched.pid)
                await until(lambda member=member: member not in box.crew._lent)
            return await call, box.metrics.faults

    result, faults = asyncio.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 3)
    assert faults["killed"] == 2


def test_without_retries_a_lost_worker_is_an_infra_error(worker_pids):
    async def main() -> ToolResult:
        async with open_sandbox(replace(PROCESS, retries=0)) as box:
            call = asyncio.create_task(box.run(SLEEP))
            await kill_each_worker_of(call, box, worker_pids)
            return await call

    result = asyncio.run(main())
    assert (result.status, result.attempts, result.return_code) == ("infra_error", 1, None)
    assert "died" in result.message


def test_worker_death_at_the_memory_limit_is_oom_at_once(worker_pids, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.launch.worker.Worker.ran_out_of_memory", lambda _: True)

    async def main() -> ToolResult:
        async with open_sandbox(PROCESS) as box:
            call = asyncio.create_task(box.run(SLEEP))
            await kill_each_worker_of(call, box, worker_pids)
            return await call

    result = asyncio.run(main())
    assert (result.status, result.attempts, result.signal) == ("oom", 1, 9)
    assert "1024 MB" in result.message


def test_what_an_earlier_program_was_killed_for_is_not_held_against_the_next(worker_pids):
    """The child of an earlier program is killed for its memory; later the worker dies under an innocent program."""
    if reason := bubblewrap.missing(SandboxConfig()):
        pytest.skip(reason)
    if cgroup.memory_folder() is None:
        pytest.skip("no memory control group can be made here")
    crowd = (
        "import os, time\nfor _ in range(12):\n"
        "    if os.fork() == 0:\n        x = bytearray(55 << 20)\n        time.sleep(20)\nprint(os.wait()[1])"
    )

    async def main() -> tuple[ToolResult, ToolResult, ToolResult, bool]:
        config = SandboxConfig(backend=("bubblewrap",), slots=1, limits=Limits(memory_mb=64))
        async with open_sandbox(config) as box:
            await box.run("print(1)")
            worker = box.crew._ready[-1]
            greedy = await box.run(crowd)
            await box.run(crowd)
            wrong = await box.run("1 / 0")
            call = asyncio.create_task(box.run(nap(2.5)))
            await until(lambda: box.crew._lent)
            same = box.crew._lent == {worker}
            await asyncio.sleep(0.15)
            kill(worker_pids(box)[0])
            return greedy, wrong, await call, same

    greedy, wrong, innocent, same = asyncio.run(main())
    assert same, "the test is about a worker that has survived"
    assert (greedy.status, greedy.stdout) == ("success", "9\n"), "it has seen a child die"
    assert wrong.status == "user_error"
    assert (innocent.status, innocent.stdout, innocent.attempts) == ("success", "ok\n", 2)


def test_hung_worker_is_noticed_from_outside(box, worker_pids, descendants, alive, monkeypatch):
    monkeypatch.setattr("retool_jax.sandbox.host.member.OVERTIME_S", 1.0)
    sandbox = box.sandbox

    async def main() -> tuple[ToolResult, set[int]]:
        # It sleeps until a point in time, so that the second attempt, which comes later, is short.
        code = f"import time\ntime.sleep(max(0, {time.time() + 3} - time.time()))\nprint('ok')"
        call = asyncio.create_task(sandbox.run(code, limits=Limits(wall_s=4)))
        await until(lambda: sandbox.crew._lent)
        pid = worker_pids(sandbox)[0]
        tree = {pid} | descendants(pid)
        send(signal.SIGSTOP, *tree)
        result = await call
        await until(lambda: not sandbox.crew._stops)
        return result, tree

    result, tree = box.runner.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 2)
    assert not alive(tree)


def test_program_faults_are_never_repeated():
    async def main() -> list[ToolResult]:
        async with open_sandbox(replace(PROCESS, slots=2)) as box:
            programs = ("1 / 0", SLEEP, "import os\nos.kill(os.getpid(), 9)")
            return list(await asyncio.gather(*(box.run(code, limits=Limits(wall_s=0.5)) for code in programs)))

    results = asyncio.run(main())
    assert [(r.status, r.attempts) for r in results] == [("user_error", 1), ("timeout", 1), ("user_error", 1)]


def test_full_queue_refuses_and_waiting_calls_are_served_in_order():
    async def main() -> tuple[list[ToolResult], list[int], ToolResult]:
        finished: list[int] = []

        async def numbered(box: Sandbox, i: int) -> ToolResult:
            result = await box.run(f"import time\ntime.sleep(0.1)\nprint({i})")
            finished.append(i)
            return result

        async with open_sandbox(replace(PROCESS, queue_limit=2)) as box:
            results = list(await asyncio.gather(*(numbered(box, i) for i in range(5))))
        async with open_sandbox(replace(PROCESS, queue_s=0.5)) as box:
            long, late = await asyncio.gather(box.run("import time\ntime.sleep(3)"), box.run("print(1)"))
            assert long.status == "success"
        return results, finished, late

    results, finished, late = asyncio.run(main())
    assert [r.status for r in results] == ["success"] * 3 + ["infra_error"] * 2
    assert all(r.message.startswith("overloaded") and r.attempts == 0 for r in [*results[3:], late])
    assert [i for i in finished if i < 3] == [0, 1, 2]
    assert 0.5 <= late.queue_s < 3


def test_cancelling_the_caller_kills_the_program_and_frees_the_slot(box, worker_pids, descendants, alive):
    sandbox = box.sandbox

    async def main() -> tuple[set[int], ToolResult]:
        *running, waiting = (asyncio.create_task(sandbox.run(SLEEP)) for _ in range(3))
        await until(lambda: len(sandbox.crew._lent) == 2)
        await asyncio.sleep(0.2)
        tree = set(worker_pids(sandbox)[:2]).union(*map(descendants, worker_pids(sandbox)[:2]))
        for task in (waiting, *running):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        result = await asyncio.wait_for(sandbox.run("print(1)"), 60)
        return await asyncio.to_thread(alive, tree), result

    left, result = box.runner.run(main())
    assert not left
    assert (result.status, result.stdout, result.attempts) == ("success", "1\n", 1)


def test_closing_answers_open_calls_and_leaves_nothing(backend: str, worker_pids, descendants, alive):
    before = descendants(os.getpid())  # for example workers of other tests

    async def main() -> tuple[list[ToolResult], set[int]]:
        async with open_sandbox(SandboxConfig(backend=(backend,), slots=2)) as box:
            calls = [asyncio.create_task(box.run(SLEEP)) for _ in range(4)]
            await until(lambda: len(box.crew._lent) == 2)
            tree = set(worker_pids(box)).union(*map(descendants, worker_pids(box)))
        with pytest.raises(RuntimeError, match="closed"):
            await box.run("print(1)")
        return list(await asyncio.gather(*calls)), tree

    results, tree = asyncio.run(main())
    assert [r.status for r in results] == ["cancelled"] * 4
    assert len(tree) >= 4
    assert not alive(tree)
    others = before.union(*map(descendants, before))
    assert not alive(descendants(os.getpid()) - others)


def test_awaiting_calls_makes_no_call_that_can_block_the_loop():
    """Checked without a clock: while 50 callers wait, the loop's thread starts no process and never sleeps."""
    blocking = ("time.sleep", "subprocess.Popen", "os.system", "os.fork", "os.posix_spawn", "socket.connect")
    loop_thread, watching, seen = threading.get_ident(), False, []

    def listen(event: str, _: tuple) -> None:
        if watching and event in blocking and threading.get_ident() == loop_thread:
            seen.append(event)

    sys.addaudithook(listen)

    async def main() -> list[ToolResult]:
        nonlocal watching
        async with open_sandbox(replace(PROCESS, slots=2)) as box:
            await until(lambda: box.crew.ready == 3)
            watching = True
            codes = ("print(1)", "1 / 0", "print('x' * 300_000)")
            results = await asyncio.gather(*(box.run(codes[i % 3]) for i in range(50)))
            watching = False
            return results

    assert {r.status for r in asyncio.run(main())} == {"success", "user_error"}
    assert seen == []


def test_requests_out_of_bounds_are_not_run():
    async def main() -> list[ToolResult]:
        async with open_sandbox(PROCESS) as box:
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
    assert (long_code.status, long_stdin.stdout) == ("success", "8388608\n")
    assert (surrogate.status, surrogate.attempts) == ("user_error", 1)
