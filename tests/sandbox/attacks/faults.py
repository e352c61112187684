"""Faults of the machinery, caused from the host: its processes are killed and stopped while a program runs.

A script is a coroutine that gets the arena and returns complaints by the name of the fault.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any
from unittest.mock import patch

from retool_jax.sandbox import Limits, ToolResult
from retool_jax.sandbox.launch.procfs import stat_fields

from ..processes import kill, send
from ..programs import nap
from .arena import Arena
from .case import MEMORY_MB
from .host import alive, command, descendants, remains, start_owner

Outcomes = dict[str, list[str]]
Script = Callable[[Arena], Awaitable[Outcomes]]

NAP_TEXT = "begun\nok\n"
LOOP = "while True:\n    pass"
SHORT = Limits(wall_s=1.5, memory_mb=MEMORY_MB)


def napping() -> str:
    """A program that prints that it runs, and then runs for a second more, in which faults can be caused."""
    return f"print('begun')\n{nap(1.2)}"


def busy_worker(arena: Arena) -> Any:
    """The launched worker that runs a call now."""
    return next(iter(arena.box.crew._lent)).launched


def family(root: int) -> dict[int, str]:
    """A process and its descendants."""
    below = descendants(root)
    start = descendants(os.getpid()).get(root)
    return below | ({root: start} if start else {})


def kinds(root: int) -> dict[str, list[int]]:
    """The processes of a worker by kind: words of the command line, and depth in the tree of processes."""
    found: dict[str, list[int]] = {}
    layer, depth = [root], 1
    everything = {pid: command(pid) for pid in family(root)}
    while layer:
        for pid in layer:
            words = everything.get(pid, "").split()
            name = os.path.basename(words[0]) if words else "?"
            part = next((word for word in words if word in ("run", "boot", "gofer")), "")
            found.setdefault(f"{name} {part} {depth}".replace("  ", " "), []).append(pid)
        layer = [pid for parent in layer for pid in everything if parent_of(pid) == parent]
        depth += 1
    return found


def parent_of(pid: int) -> int:
    try:
        return int(stat_fields(pid)[1])
    except OSError:
        return 0


def runs_programs(backend: str, name: str, pids: list[int]) -> bool:
    """Whether a kind of process is, or holds, the program: under gVisor those that lend it their memory, else those of
    another user."""
    if backend == "gvisor":
        return "runsc" not in name and not name.startswith("sh ")
    with suppress(OSError):
        return any(os.stat(f"/proc/{pid}").st_uid != os.geteuid() for pid in pids)
    return False


def served(result: ToolResult, hurt: int = 0) -> list[str]:
    """Complain unless the call ended as if nothing had happened, or as a program that itself got the signal `hurt`."""
    if (result.status, result.stdout) == ("success", NAP_TEXT):
        return []
    if hurt == signal.SIGKILL and (result.status, result.signal) == ("user_error", signal.SIGKILL):
        return []
    if hurt == signal.SIGSTOP and (result.status, result.stdout) == ("timeout", "begun\n"):
        return []
    return [f"{result.status} {result.stdout!r} {result.message} after {result.attempts} attempts"]


async def hurt_each_kind(arena: Arena, number: int, word: str) -> Outcomes:
    """Send a signal to each kind of process of the worker in turn, while it runs a program."""
    outcomes: Outcomes = {}
    names: list[str] | None = None
    while names is None or names:
        call = asyncio.create_task(arena.box.run(napping(), limits=SHORT))
        await asyncio.sleep(0.3)
        root = busy_worker(arena).pid
        found, everything = kinds(root), family(root)
        names = sorted(found) if names is None else names
        name = names.pop(0)
        program_too = runs_programs(arena.backend, name, found.get(name, []))
        send(number, *found.get(name, []))
        begun = time.monotonic()
        result = await call
        wrong = served(result, number if program_too else 0)
        if time.monotonic() - begun > 25:
            wrong.append(f"answered after {time.monotonic() - begun:.0f} s")
        wrong += await arena.take_census() + arena.host.complaints()
        if result.attempts > 1:
            left = await asyncio.to_thread(alive, everything)
            wrong += [f"{text} is left" for text in left.values()]
        outcomes[f"{word} {name}"] = wrong
    return outcomes


async def kill_each_kind(arena: Arena) -> Outcomes:
    return await hurt_each_kind(arena, signal.SIGKILL, "kill")


async def stop_each_kind(arena: Arena) -> Outcomes:
    with patch("retool_jax.sandbox.host.member.OVERTIME_S", 1.0):
        return await hurt_each_kind(arena, signal.SIGSTOP, "stop")


async def calm(arena: Arena) -> dict[int, str]:
    """Wait until no worker is being started or removed; returns the live processes."""
    crew = arena.box.crew
    while crew._stops or crew.ready + len(crew._lent) <= arena.box.config.slot_count:
        await asyncio.sleep(0.05)
    return arena.host.own()


async def kill_idle(arena: Arena) -> Outcomes:
    """Every process of every worker dies while no program runs."""
    before = await calm(arena)
    kill(*before)
    result = await arena.box.run(napping(), limits=SHORT)
    wrong = served(result) + await arena.take_census()
    wrong += [f"{text} is left" for text in (await asyncio.to_thread(alive, before)).values()]
    return {"kill everything idle": wrong}


async def kill_all(arena: Arena) -> Outcomes:
    """Every process of every worker dies while a program runs."""
    await calm(arena)
    call = asyncio.create_task(arena.box.run(napping(), limits=SHORT))
    await asyncio.sleep(0.3)
    before = arena.host.own()
    # The oldest first: a supervisor that lived longer than its program would report how that one ended.
    kill(*sorted(before, key=lambda pid: (int(before[pid]), pid)))
    wrong = served(await call) + await arena.take_census()
    wrong += [f"{text} is left" for text in (await asyncio.to_thread(alive, before)).values()]
    return {"kill everything busy": wrong}


async def kill_every_attempt(arena: Arena) -> Outcomes:
    """The worker dies under each attempt: the caller gets the true reason, and the next call is served."""
    call = asyncio.create_task(
        arena.box.run("import time\ntime.sleep(20)", limits=Limits(wall_s=60, memory_mb=MEMORY_MB))
    )
    killed = 0
    while not call.done():
        await asyncio.sleep(0.05)
        for member in tuple(arena.box.crew._lent):
            if member.calls and not member.dead:
                await asyncio.sleep(0.2)
                kill(member.launched.pid, *descendants(member.launched.pid))
                killed += 1
                await asyncio.sleep(0.1)
    result = await call
    wrong = [] if result.status in ("infra_error", "oom", "user_error") else [f"{result.status} after {killed} deaths"]
    wrong += [] if 2 <= result.attempts <= 3 else [f"{result.attempts} attempts"]
    return {"kill every attempt": wrong + await arena.take_census()}


async def give_up(arena: Arena) -> Outcomes:
    """The caller cancels: the program is gone, the next call is served."""
    call = asyncio.create_task(arena.box.run(LOOP, limits=Limits(wall_s=60, memory_mb=MEMORY_MB)))
    await asyncio.sleep(0.3)
    before = family(busy_worker(arena).pid)
    call.cancel()
    begun = time.monotonic()
    await asyncio.gather(call, return_exceptions=True)
    wrong = [] if time.monotonic() - begun < 3 else ["cancelling took more than 3 s"]
    wrong += await arena.take_census()
    cpu = {pid: text for pid, text in (await asyncio.to_thread(alive, before)).items()}
    wrong += [f"{text} is left" for text in cpu.values()]
    return {"the caller gives up": wrong}


async def nonsense_in(arena: Arena) -> Outcomes:
    """Bytes that are not a frame go into the pipe of an idle worker and of a busy one."""
    wrong: list[str] = []
    for member in tuple(arena.box.crew._ready):
        member.launched.writer.write(b"\xff" * 100)
    wrong += served(await arena.box.run(napping(), limits=SHORT))
    call = asyncio.create_task(arena.box.run(napping(), limits=SHORT))
    await asyncio.sleep(0.3)
    busy_worker(arena).writer.write(b"\x00\x00\x00\x02{}")
    wrong += served(await call)
    return {"nonsense in the pipe": wrong + await arena.take_census()}


async def owner_dies(arena: Arena) -> Outcomes:
    """The owning process dies in different ways; nothing of its sandbox survives for long.

    A stopped sandbox cannot notice that its owner has died, so the next owner must remove it.
    """
    ways = ((signal.SIGKILL, "kill"), (signal.SIGTERM, "terminate"), (signal.SIGINT, "interrupt"))

    async def die(number: int) -> tuple[int, list[str]]:
        owner = await asyncio.to_thread(start_owner, arena.backend, LOOP)
        tree = descendants(owner.pid)
        wrong = [] if tree else ["no sandbox was seen"]
        owner.send_signal(number)
        await asyncio.to_thread(owner.wait, 15)
        wrong += [f"{text} outlived its owner" for text in (await asyncio.to_thread(alive, tree)).values()]
        kill(*alive(tree, 0))
        return owner.pid, wrong

    async def die_of_a_stopped_sandbox() -> tuple[int, dict[int, str]]:
        owner = await asyncio.to_thread(start_owner, arena.backend, LOOP)
        tree = descendants(owner.pid)
        send(signal.SIGSTOP, *tree)
        owner.kill()
        await asyncio.to_thread(owner.wait, 15)
        return owner.pid, tree

    *ends, (stopped, tree) = await asyncio.gather(*(die(number) for number, _ in ways), die_of_a_stopped_sandbox())
    left = await swept(arena, stopped, *(pid for pid, _ in ends)) + await arena.take_census()
    outcomes = {f"{word} the owner": wrong + left for (_, word), (_, wrong) in zip(ways, ends, strict=True)}
    wrong = [] if tree else ["no sandbox was seen"]
    wrong += [f"{text} outlived the sweep" for text in (await asyncio.to_thread(alive, tree)).values()]
    kill(*alive(tree, 0))
    return outcomes | {"kill the owner of a stopped sandbox": wrong + left}


async def swept(arena: Arena, *dead: int) -> list[str]:
    """Start another owner, which sweeps; returns what is left of dead owners."""
    other = await asyncio.to_thread(start_owner, arena.backend, "print(1)", 5.0)
    await asyncio.to_thread(other.wait, 15)
    left = [what for pid in dead for what in await asyncio.to_thread(remains, f"retool-{pid}-")]
    return [f"{what} is left of a dead owner" for what in left]


async def owner_pauses(arena: Arena) -> Outcomes:
    """The owner is stopped for longer than the program may run; the result must be the same as otherwise."""
    owner = await asyncio.to_thread(start_owner, arena.backend, "import time\ntime.sleep(0.8)", 1.4)
    owner.send_signal(signal.SIGSTOP)
    await asyncio.sleep(1.5)
    owner.send_signal(signal.SIGCONT)
    said, _ = await asyncio.to_thread(owner.communicate, None, 15)
    return {"stop the owner": [] if said == "success\n" else [f"the owner said {said!r}"]}


async def seeds_differ(arena: Arena) -> Outcomes:
    """Random numbers of two calls have nothing in common."""
    code = (
        "import os, random, tempfile, uuid\nimport numpy\n"
        "print(random.random(), numpy.random.rand(), numpy.random.default_rng().random(), uuid.uuid4(),\n"
        "      os.urandom(4).hex(), next(tempfile._get_candidate_names()))"
    )
    first, second = [(await arena.box.run(code, limits=SHORT)).stdout.split() for _ in range(2)]
    same = set(first) & set(second)
    return {"random numbers": [f"both calls drew {sorted(same)}"] if same or len(first) != 6 else []}


async def sessions_apart(arena: Arena) -> Outcomes:
    """Two sessions and a call cannot see or harm each other."""
    wrong: list[str] = []
    hostile = """
import os
open('/tmp/planted', 'w').write('x')
for pid in filter(str.isdecimal, os.listdir('/proc')):
    try:
        int(pid) == os.getpid() or os.kill(int(pid), 9)
    except OSError:
        pass
print('done')
"""
    async with arena.box.session() as one, arena.box.session() as two:
        await one.run("x = 1", limits=SHORT)
        result = await two.run(hostile, limits=SHORT)
        wrong += (
            []
            if result.stdout == "done\n"
            else [f"the hostile cell: {result.status} {result.stdout!r} {result.stderr!r}"]
        )
        result = await one.run("import os\nprint(x, os.path.exists('/tmp/planted'))", limits=SHORT)
        wrong += (
            []
            if result.stdout == "1 False\n"
            else [f"the other session: {result.status} {result.stdout!r} {result.stderr!r}"]
        )
        result = await arena.box.run("import os\nprint('x' in globals(), os.path.exists('/tmp/planted'))", limits=SHORT)
        wrong += [] if result.stdout == "False False\n" else [f"a call beside them: {result.status} {result.stdout!r}"]
    return {"apart": wrong + await arena.take_census()}


SCRIPTS: dict[str, tuple[str, Script]] = {
    "random numbers": ("state", seeds_differ),
    "apart": ("sessions", sessions_apart),
    "kill each kind": ("faults", kill_each_kind),
    "stop each kind": ("faults", stop_each_kind),
    "kill everything idle": ("faults", kill_idle),
    "kill everything busy": ("faults", kill_all),
    "kill every attempt": ("faults", kill_every_attempt),
    "the caller gives up": ("faults", give_up),
    "nonsense in the pipe": ("faults", nonsense_in),
    "the owner dies": ("faults", owner_dies),
    "the owner pauses": ("faults", owner_pauses),
}
