"""What the launchers share: the environment of programs, the start of a worker, and its handle."""

import asyncio
import functools
import json
import os
import signal
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec

from retool_jax.errors import UserError
from retool_jax.sandbox.launch.cgroup import WorkerGroup
from retool_jax.sandbox.launch.procfs import Seen, family, look_at, owner_tag, proportional_mb

P = ParamSpec("P")
INSIDE = Path(__file__).parents[1] / "inside"
STOP_GRACE_S = 1.0
LOOK_S = 0.5  # between two looks at what a worker that does not answer is doing
BUSY_SHARE = 0.05  # of a core: more than that, and it is busy
CROWD = 16  # threads of programs: so many are reason enough that nothing else makes progress
# Signals that end a process because of its own mistake. Any other signal was sent by somebody, and not by a program:
# no program can reach the processes that hold it.
CRASH_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS})
STREAM_BUFFER_BYTES = 1 << 20
LAST_WORDS_BYTES = 65536
TIERS = ("base", "numpy", "sympy", "scipy")

# Built from nothing, so that no token or key of the host's environment can be read by a program. One thread per maths
# library: a slot stands for one core.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}
# The supervisor's alone, for mounts, user ids and the files and processes of its programs, which have none.
CAPABILITIES = [f"CAP_{name}" for name in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL", "CHOWN", "DAC_OVERRIDE")]


@dataclass(eq=False)
class Worker:
    """A running supervisor: frames go in at `writer` and come out at `reader`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    process: asyncio.subprocess.Process
    group: WorkerGroup | None  # the memory cgroup that holds all of the worker, if there is one
    tidy: Callable[[], Awaitable[None]]  # removes what the launcher made for it, once the outermost process is dead
    machinery: dict[int, int] = field(default_factory=dict)  # its processes from before a program ran: pid, start
    _kills_before: int = 0
    _words: deque[bytes] = field(default_factory=lambda: deque(maxlen=16))
    _stopped: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int:
        """The outermost process."""
        return self.process.pid

    async def _listen(self) -> None:
        """Read stderr, so that a full pipe never blocks the worker; its end is kept."""
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(LAST_WORDS_BYTES // 16):
            self._words.append(data)

    async def last_words(self) -> str:
        """The end of what the worker wrote to stderr, on one line; waits a moment for a dying one to finish."""
        await asyncio.wait([self._listener], timeout=STOP_GRACE_S)
        lines = b"".join(self._words).decode(errors="replace").strip().split("\n")
        return " | ".join(line.strip() for line in lines[-4:])

    def _memory_kills(self) -> int:
        """How many of its processes the kernel has killed for want of memory, as far as that is known."""
        return self.group.oom_kills() if self.group is not None else 0

    def begin_call(self) -> None:
        """Forget what earlier programs were killed for: from here on `ran_out_of_memory` is about the new call."""
        self._kills_before = self._memory_kills()

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed anything in the worker for want of memory since the call began.

        Ask before `stop`, which removes the evidence.
        """
        return self._stopped is None and self._memory_kills() > self._kills_before

    async def why_dead(self) -> str:
        """What ended a dead worker: "killed" if it was a signal that somebody outside has sent, "broken" if it went by
        itself, "died" where that cannot be told.

        No program can signal what holds it, and where there is a memory group the kernel's own kills are counted (see
        `ran_out_of_memory`).
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.process.wait()), STOP_GRACE_S)
        code = self.process.returncode
        if self.group is None or code in (None, 0):  # 0: the supervisor left in order, because its input was at an end
            return "died"
        number = -code if code < 0 else code - 128  # the launchers tell of a signal to what they started like a shell
        return "killed" if 0 < number < signal.NSIG and number not in CRASH_SIGNALS else "broken"

    def know_machinery(self) -> None:
        """Look at the processes that run before a program does: no program can stop them."""
        self.machinery = {pid: seen.started for pid, seen in self._look().items() if seen.state != "T"}

    async def why_hung(self) -> str:
        """Why there is no answer long after a program's time.

        "stopped" or "killed" if somebody outside did that to a process of the machinery, which no program can; else
        "overrun" if what the program has set going keeps the processor busy or is a crowd, else "hung". A crowd at the
        first look counts: it may be on its way out at the second one.
        """
        before = await asyncio.to_thread(self._look)
        await asyncio.sleep(LOOK_S)
        after = await asyncio.to_thread(self._look)
        ours = {pid for pid, seen in after.items() if self.machinery.get(pid) == seen.started}
        if any(after[pid].state == "T" for pid in ours):
            return "stopped"
        if self.group is not None and len(ours) < len(self.machinery):
            return "killed"
        used_s = sum(seen.cpu_s - (before[pid].cpu_s if pid in before else 0.0) for pid, seen in after.items())
        crowd = max(
            sum(seen.threads for pid, seen in look.items() if self.machinery.get(pid) != seen.started)
            for look in (before, after)
        )
        return "overrun" if used_s >= BUSY_SHARE * LOOK_S or crowd >= CROWD else "hung"

    def _look(self) -> dict[int, Seen]:
        return {pid: seen for pid in self.processes() if (seen := look_at(pid)) is not None}

    def processes(self) -> list[int]:
        """All that run in it, as the host counts them."""
        return self.group.processes() if self.group is not None else family(self.pid)

    def move(self, cores: set[int]) -> None:
        """Have all its threads run on these cores from now on."""
        for _ in range(2):  # what starts meanwhile inherits the cores of the thread that starts it
            for pid in self.processes():
                with suppress(OSError):  # it ended meanwhile
                    for thread in os.listdir(f"/proc/{pid}/task"):
                        os.sched_setaffinity(int(thread), cores)

    def memory_mb(self) -> float | None:
        """Memory in use now, MiB: of the cgroup, else the proportional share of each process; None if unknown."""
        if self.group is not None:
            return self.group.usage_mb()
        return proportional_mb(self.pid)

    async def stop(self) -> None:
        """End the worker and everything in it, and remove what was made for it. Safe to call twice or on a dead one."""
        if self._stopped is None:
            self._stopped = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopped)

    async def _stop(self) -> None:
        self.writer.close()  # end of file tells the supervisor to kill its programs and leave
        try:
            await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            with suppress(TimeoutError):  # one that the kernel cannot end just now must not hold up its owner
                await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        await self.tidy()
        if self.group is not None:
            await self.group.remove()
        self._listener.cancel()


async def nothing() -> None:
    """The `tidy` of a launcher that leaves nothing."""


def supervisor_command(interpreter: str, inside: str, /, **setup: object) -> list[str]:
    """The command line of the program inside; `setup` is the rest of what `inside/supervisor.py` describes."""
    setup = {"owner": owner_tag(), "tiers": TIERS, **setup}
    # -S keeps `site` and its .pth files (some run code, 20 ms and more) out of the start.
    return [interpreter, "-I", "-S", f"{inside}/supervisor.py", json.dumps(setup)]


def undone_if_cancelled(launch: Callable[P, Awaitable[Worker]]) -> Callable[P, Awaitable[Worker]]:
    """Make a cancelled start of a worker run to its end, and stop that worker, before the cancellation goes on.

    Where asyncio is cancelled between the fork and the pipes to the child, it may wait for these pipes for ever, and
    what was made for a worker that is not there yet would be nobody's.
    """

    @functools.wraps(launch)
    async def run(*args: P.args, **kwargs: P.kwargs) -> Worker:
        launching = asyncio.ensure_future(launch(*args, **kwargs))
        try:
            return await asyncio.shield(launching)
        except asyncio.CancelledError:
            with suppress(UserError, OSError):
                await (await launching).stop()
            raise

    return run


@undone_if_cancelled
async def start(
    command: Sequence[str],
    *,
    group: WorkerGroup | None = None,
    tidy: Callable[[], Awaitable[None]] = nothing,
    keep: Sequence[int] = (),
) -> Worker:
    """Start a worker's outermost process, in `group` from its first instruction on.

    keep: further descriptors that it inherits. If it does not start, `tidy` runs and the group is removed, then
    OSError is raised.
    """
    if group is not None:  # `sh` moves itself, so that nothing can be forked before the move
        enter = 'while [ "$1" != -- ]; do echo 0 > "$1" || exit 1; shift; done; shift; exec "$@"'
        command = ["/bin/sh", "-c", enter, "sh", *map(str, group.entrances), "--", *command]

    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer, which closes the sandbox in order
            limit=STREAM_BUFFER_BYTES,
            pass_fds=keep,
        )
    except BaseException:
        await tidy()
        if group is not None:
            await group.remove()
        raise
    assert process.stdin is not None and process.stdout is not None
    return Worker(process.stdout, process.stdin, process, group, tidy)
