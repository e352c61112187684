"""One back-end under attack: its sandbox, the host, and the processes that were seen."""

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import Any

from retool_jax.sandbox import Limits, Sandbox, SandboxConfig, ToolResult, open_sandbox

from ..processes import kill
from .case import MEMORY_MB, Case, fill, judge
from .host import Host
from .sessions import FRESH, Cell, Session

CROWD = 4
"""Number of sociable cases that run side by side, each in its own worker."""
BATCH = 12
"""Number of sociable cases between two checks of what they left."""

# Prints what a program finds; after each attack it must be the same as at the beginning.
CENSUS = """
import glob, os, resource, signal, sys
def listed(path):
    try:
        return sorted(os.listdir(path))
    except OSError:
        return None
strangers = 0
for path in glob.glob("/proc/[0-9]*"):
    try:
        owner = os.stat(path).st_uid
        if open(path + "/stat").read().rpartition(")")[2].split()[0] in "ZX":
            continue
    except OSError:
        continue
    strangers += owner not in (0, 65534) and path != f"/proc/{os.getpid()}"
segments = [len(open(p).readlines()) for p in glob.glob("/proc/sysvipc/*")]
print(6 * 7, listed("."), listed("/dev/shm"), listed("/var/tmp"), listed("/tmp"), strangers, segments, sys.path[1:])
print(sorted(os.environ.items()), os.umask(0o22), resource.getrlimit(resource.RLIMIT_NOFILE), len(sys.modules))
for pid in (1, os.getppid() or 1):
    print(os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid), len(os.sched_getaffinity(pid)))
print(len(os.listdir("/proc/self/fd")), signal.getsignal(signal.SIGINT), sys.getrecursionlimit(), os.nice(0))
"""

# Checks that the back-end isolates, before any program that could harm the machine runs.
GUARD = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
wrong = []
if os.getuid() == 0 or int(status.get("CapEff", "0"), 16):
    wrong.append(f"programs run with rights: uid {os.getuid()}, capabilities {status.get('CapEff')}")
try:
    if b"python" in open("/proc/@PID@/cmdline", "rb").read() and os.getpid() > 1000:
        wrong.append("programs see the host's processes")
except OSError:
    pass
try:
    open("@CANARY@")
    wrong.append("programs read the host's files")
except OSError:
    pass
print(wrong)
"""


class Arena:
    """An open sandbox of one back-end in its own event loop, with `slots` workers. Call `close` at the end."""

    def __init__(self, backend: str, host: Host, slots: int = 1) -> None:
        self.backend, self.host = backend, host
        self.words = host.words | {"BACKEND": backend}
        self.runner = asyncio.Runner()
        self.played: dict[tuple[str, str], list[str]] = {}
        self.seen: dict[int, str] = {}
        """Every process of the sandbox that was ever seen."""
        self._stack = AsyncExitStack()
        config = SandboxConfig(backend=(backend,), slots=slots, limits=Limits(memory_mb=MEMORY_MB), probe_s=0)
        self.box: Sandbox = self.runner.run(self._stack.enter_async_context(open_sandbox(config)))
        self.census = ""
        wrong = self.runner.run(self.take_census())
        guard_code = fill(Case("", "", GUARD), self.words).code
        guard = self.runner.run(self.box.run(guard_code))
        self.unfit = "" if guard.stdout == "[]\n" and not wrong else f"{guard.stdout}{guard.stderr}{wrong}"
        """Why no harmful program may run here; "" if they may."""

    def close(self) -> None:
        self.runner.run(self._stack.aclose())
        self.runner.close()

    async def take_census(self) -> list[str]:
        """Run a harmless program; complain if it does not find the same as the first one."""
        result = await self.box.run(CENSUS, limits=Limits(wall_s=15, memory_mb=MEMORY_MB))
        self.seen |= self.host.own()
        if result.status != "success":
            return [f"the next call: {result.status} {result.message} {result.stderr[-300:]!r}"]
        self.census = self.census or result.stdout
        if result.stdout != self.census:
            kill(*(member.launched.pid for member in self.box.crew._ready))  # the next case begins with a new worker
            await self.box.run("None")
            pairs = zip(result.stdout.splitlines(), self.census.splitlines(), strict=False)
            return [f"the next call found {now!r}, not {first!r}" for now, first in pairs if now != first]
        return []

    def shows_secret(self, result: ToolResult) -> list[str]:
        text = result.stdout + result.stderr + result.message
        data = text.encode("utf-8", "surrogatepass") + b"".join(result.files.values())
        return ["the host's secret came out"] if self.host.secret.encode() in data else []

    async def attack(self, case: Case) -> list[str]:
        """Run a case and the calls after it; returns complaints."""
        return await self.play(case) + await self.take_census() + self.host.complaints()

    async def beside(self, *attacks: Coroutine[Any, Any, list[str]], fresh: bool = False) -> list[list[str]]:
        """Run attacks side by side, then check every worker, and with `fresh` a new session.

        What these checks find counts against each of the attacks.
        """
        found = await asyncio.gather(*attacks)
        if fresh:
            found.append(await self.converse(Session("a new session", (FRESH,))))
        censuses = await asyncio.gather(*(self.take_census() for _ in range(self.box.config.slots)))
        shared = [*(text for census in censuses for text in census), *self.host.complaints()]
        shared += found.pop() if fresh else []
        return [wrong + shared for wrong in found]

    async def play(self, case: Case) -> list[str]:
        """Run a case and the calls that follow it; returns complaints about their results."""
        case = fill(case, self.words)
        limits = Limits(wall_s=case.limit_s, memory_mb=case.memory_mb, **case.limits)
        begun = time.monotonic()
        call = asyncio.create_task(
            self.box.run(case.code, stdin=case.stdin, files=dict(case.files), fetch=case.fetch, limits=limits)
        )
        watch = None
        if case.during is not None:
            watch = asyncio.create_task(asyncio.to_thread(case.during, self.host, lambda: not call.done()))
        result = await call
        wrong = judge(case, result, time.monotonic() - begun - result.queue_s) + self.shows_secret(result)
        if watch is not None and (complaint := await watch):
            wrong.append(complaint)
        if result.attempts > 1:
            wrong.append(f"it took {result.attempts} attempts: the program broke the machinery")
        for code, expected in case.then:
            expected = expected.replace("@STDOUT@", result.stdout)
            after = await self.box.run(code, limits=Limits(wall_s=60, memory_mb=MEMORY_MB))
            if after.stdout != expected:
                wrong.append(
                    f"afterwards {after.status} {after.stdout[:200]!r}, not {expected!r}: {after.stderr[-200:]!r}"
                )
            wrong += self.shows_secret(after)
        return wrong

    def attack_in_company(self, case: Case, cases: list[Case]) -> list[str]:
        """Complaints about a sociable case, which runs together with its neighbours among the sociable `cases`."""
        key = case.category, case.name
        if key not in self.played:
            company = [other for other in cases if other.sociable]
            at = company.index(case) // BATCH * BATCH
            batch = company[at : at + BATCH]
            found = self.runner.run(self.beside(*map(self.play, batch)))
            self.played |= {(other.category, other.name): wrong for other, wrong in zip(batch, found, strict=True)}
        return self.played[key]

    def converse_in_company(self, session: Session, sessions: list[Session]) -> list[str]:
        """Complaints about a session, which runs together with its neighbours."""
        key = "sessions", session.name
        if key not in self.played:
            at = sessions.index(session) // CROWD * CROWD
            batch = sessions[at : at + CROWD]
            found = self.runner.run(self.beside(*map(self.converse, batch), fresh=True))
            self.played |= {("sessions", other.name): wrong for other, wrong in zip(batch, found, strict=True)}
        return self.played[key]

    async def converse(self, session: Session) -> list[str]:
        """Run the cells of a session; returns complaints."""
        wrong: list[str] = []

        async def ask(talk, cell: Cell) -> None:
            begun = time.monotonic()
            case = Case("sessions", session.name, cell.code, cell.status, cell.stdout, wall_s=cell.wall_s)
            result = await talk.run(cell.code, limits=Limits(wall_s=case.limit_s, memory_mb=MEMORY_MB))
            complaints = judge(case, result, time.monotonic() - begun - result.queue_s) + self.shows_secret(result)
            wrong.extend(f"cell {cell.code[:60]!r}: {text}" for text in complaints)

        async with self.box.session() as talk:
            for cell in session.cells:
                await ask(talk, cell)
        return wrong
