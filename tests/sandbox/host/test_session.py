"""Sessions: what they keep, what ends them, and that a lost session is never the model's fault."""

import asyncio
import os
from dataclasses import replace

import pytest

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, Session, ToolResult, open_sandbox

from ..processes import kill
from ..programs import SLEEP, nap, until

PROCESS = SandboxConfig(backend=("process",), slots=1, probe_s=0)


def cells(config: SandboxConfig, *codes: str, limits: Limits | None = None) -> list[ToolResult]:
    async def main() -> list[ToolResult]:
        async with open_sandbox(config) as box, box.session() as session:
            return [await session.run(code, limits=limits) for code in codes]

    return asyncio.run(main())


def test_variables_imports_files_and_random_state_stay(backend: str):
    config = SandboxConfig(backend=(backend,), slots=1)
    results = cells(
        config,
        "import math\nx = 41\nopen('f', 'w').write('kept')",
        "x + 1",
        "def f(): return math.gcd(x, 82)\nf()",
        "1 / 0",
        "print(open('f').read(), __name__)",
    )
    assert [r.stdout for r in results] == ["4\n", "42\n", "41\n", "", "kept __main__\n"]
    assert [r.status for r in results] == ["success", "success", "success", "user_error", "success"]
    assert all(r.attempts == 1 and "interpreter" not in r.message for r in results)


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("while True: pass", "timeout"),
        ("exit(3)", "user_error"),
        ("exit()", "success"),
        ("import os\nos.kill(os.getpid(), 9)", "user_error"),
        ("while True: print('x' * 1000)", "output_limit"),
    ],
)
def test_what_ends_the_interpreter_is_told_and_the_next_cell_is_fresh(code: str, status: str):
    limits = Limits(wall_s=2, raw_output_bytes=100_000)
    _, ended, fresh, after = cells(PROCESS, "x = 1", code, "'x' in globals()", "2 + 2", limits=limits)
    assert ended.status == status
    assert ended.message.endswith("the interpreter ended, and with it all that earlier code defined")
    assert (fresh.stdout, fresh.message, after.stdout) == ("False\n", "", "4\n")


def test_sessions_do_not_see_each_other_and_share_the_slots():
    async def main() -> tuple[list[ToolResult], list[int], int]:
        busiest, values = 0, []
        async with open_sandbox(replace(PROCESS, sessions=3)) as box:

            async def trajectory(i: int) -> list[ToolResult]:
                nonlocal busiest
                async with box.session() as session:
                    first = await session.run(f"import time\nmine = {i}\ntime.sleep(0.1)")
                    busiest = max(busiest, int(box.gauges()["slots_busy"]))
                    return [first, await session.run("mine")]

            results = await asyncio.gather(*map(trajectory, range(3)))
            values = [int(second.stdout) for _, second in results]
            return [r for pair in results for r in pair], values, busiest

    results, values, busiest = asyncio.run(main())
    assert all(r.status == "success" for r in results)
    assert (values, busiest) == ([0, 1, 2], 1)


async def kill_worker(session: Session) -> None:
    member = session._member
    kill(member.launched.pid)
    while not member.dead:
        await asyncio.sleep(0.01)


def test_a_lost_interpreter_is_an_infra_error_for_good():
    async def main() -> list[ToolResult]:
        async with open_sandbox(PROCESS) as box, box.session() as session:
            first = await session.run("x = 1")
            await kill_worker(session)
            return [first, await session.run("x"), await session.run("print(1)")]

    first, lost, after = asyncio.run(main())
    assert first.status == "success"
    assert (lost.status, lost.attempts, after.status) == ("infra_error", 1, "infra_error")
    assert "lost" in after.message


def test_the_first_cell_is_repeated_like_any_call():
    async def main() -> ToolResult:
        async with open_sandbox(PROCESS) as box, box.session() as session:
            call = asyncio.create_task(session.run(nap(1.5)))
            while session._member is None or not session._member.calls:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await kill_worker(session)
            return await call

    result = asyncio.run(main())
    assert (result.status, result.stdout, result.attempts) == ("success", "ok\n", 2)


def test_a_cancelled_cell_is_killed_and_ends_the_session(descendants, alive):
    async def main() -> tuple[set[int], ToolResult, ToolResult]:
        async with open_sandbox(PROCESS) as box, box.session() as session:
            await session.run("x = 1")
            call = asyncio.create_task(session.run(SLEEP))
            await asyncio.sleep(0.2)
            tree = {session._member.launched.pid} | descendants(session._member.launched.pid)
            call.cancel()
            await asyncio.wait([call])
            after = await session.run("x")
            return await asyncio.to_thread(alive, tree), after, await box.run("print(1)")

    left, after, other = asyncio.run(main())
    assert not left
    assert (after.status, other.stdout) == ("infra_error", "1\n")


def test_idle_sessions_are_closed_and_say_so(descendants, alive):
    async def main() -> tuple[ToolResult, set[int]]:
        async with open_sandbox(replace(PROCESS, session_ttl_s=0.7)) as box, box.session() as session:
            for _ in range(3):  # each cell restarts the wait
                await session.run("x = 1")
                await asyncio.sleep(0.3)
            pid = session._member.launched.pid
            tree = {pid} | descendants(pid)
            await until(lambda: not box.gauges()["sessions_open"])
            return await session.run("x"), await asyncio.to_thread(alive, tree)

    late, left = asyncio.run(main())
    assert (late.status, late.attempts) == ("infra_error", 0), "it misses its variables, and did not choose to wait"
    assert "after 0.7 s without a call" in late.message
    assert not left


def test_no_more_sessions_than_allowed():
    async def main() -> tuple[ToolResult, ToolResult, ToolResult]:
        async with open_sandbox(replace(PROCESS, sessions=1, queue_s=0.3)) as box:
            async with box.session() as first, box.session() as second:
                await first.run("x = 1")
                refused = await second.run("print(1)")
            async with box.session() as third:
                return refused, await third.run("print(3)"), await first.run("x")

    refused, third, closed = asyncio.run(main())
    assert refused.status == "infra_error" and refused.message.startswith("overloaded: 1 sessions are open")
    assert third.stdout == "3\n"
    assert (closed.status, closed.message) == ("rejected", "the session is closed")


def test_memory_beyond_the_session_s_own_is_refused_and_kept_within():
    async def main(box: Sandbox) -> list[ToolResult]:
        async with box.session() as session:
            return [
                await session.run("x = 1"),
                await session.run("x", limits=Limits(memory_mb=2048)),
                await session.run("y = bytearray(1500 << 20)"),
                await session.run("x"),
            ]

    async def opened() -> list[ToolResult]:
        async with open_sandbox(PROCESS) as box:
            return await main(box)

    _, refused, bomb, after = asyncio.run(opened())
    assert (refused.status, bomb.status) == ("rejected", "oom")
    assert "this session began with at most 1024" in refused.message
    ended = "interpreter ended" in bomb.message
    assert after.status == ("user_error" if ended else "success"), "state is kept unless its end was told"


def test_closing_the_sandbox_ends_open_cells(descendants, alive):
    before = descendants(os.getpid())

    async def main() -> list[ToolResult]:
        async with open_sandbox(PROCESS) as box:
            session = box.session()
            await session.run("x = 1")
            calls = [asyncio.create_task(session.run(SLEEP)), asyncio.create_task(box.session().run(SLEEP))]
            await asyncio.sleep(0.3)
        return list(await asyncio.gather(*calls))

    assert [r.status for r in asyncio.run(main())] == ["cancelled"] * 2
    assert not alive(descendants(os.getpid()) - before)


def test_a_session_that_is_closed_under_its_cells_gives_everything_back_once():
    async def main() -> tuple[list[ToolResult], float, dict[str, int]]:
        async with open_sandbox(replace(PROCESS, sessions=1, queue_s=5.0)) as box:
            async with box.session() as session:  # while a cell runs
                await session.run("x = 1")
                calls = [asyncio.create_task(session.run(SLEEP))]
                await until(lambda: box.gauges()["slots_busy"])
            async with box.session() as other:  # while a cell waits until another session ends
                await other.run("x = 2")
                async with box.session() as session:
                    calls.append(asyncio.create_task(session.run("x = 3")))
                    await until(lambda: box.sessions.waiting)
            async with box.session() as session:  # while a cell's worker starts
                calls.append(asyncio.create_task(session.run("x = 4", limits=Limits(memory_mb=2048))))
                await until(lambda: box.gauges()["slots_busy"])
            results = await asyncio.gather(*calls)
            return results, box.gauges()["sessions_open"], dict(box.metrics.restarts)

    results, still_open, restarts = asyncio.run(main())
    assert [r.status for r in results] == ["infra_error", "rejected", "infra_error"]
    assert [r.message for r in results[1:]] == ["the session is closed"] * 2
    assert (still_open, restarts) == (0, {"session end": 3})
