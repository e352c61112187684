"""Shared by the launchers: the environment of programs, the start of a worker, and its handle."""

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
LOOK_S = 0.5  # between two looks at a worker that does not answer
BUSY_SHARE = 0.05  # of a core: a worker that uses more is busy
CROWD = 16  # threads of programs: so many can keep everything else from making progress
# Signals of a crash. Any other signal was sent by somebody, and not by a program: a program cannot signal the processes
# of its sandbox.
CRASH_SIGNALS = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT, signal.SIGSYS})
STREAM_BUFFER_BYTES = 1 << 20
LAST_WORDS_BYTES = 65536
TIERS = ("base", "numpy", "sympy", "scipy")

# The whole environment of programs: nothing is taken from the host's, which may hold tokens and keys. Mathematical
# libraries get one thread, because a slot stands for one core.
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
# For the supervisor alone: mounts, user ids, and its programs' files and processes. Programs have no capabilities.
CAPABILITIES = [f"CAP_{name}" for name in ("SYS_ADMIN", "SETUID", "SETGID", "SETPCAP", "KILL", "CHOWN", "DAC_OVERRIDE")]


@dataclass(eq=False)
class Worker:
    """A running supervisor: requests go to `writer`, and answers come from `reader`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    process: asyncio.subprocess.Process
    group: WorkerGroup | None  # the memory cgroup with all processes of the worker, if there is one
    tidy: Callable[[], Awaitable[None]]  # removes what the launcher made for it, after its outermost process has ended
    machinery: dict[int, int] = field(default_factory=dict)  # pid -> start, of what ran before a program
    _kills_before: int = 0
    _stderr_end: deque[bytes] = field(default_factory=lambda: deque(maxlen=16))
    _stopped: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._listener = asyncio.create_task(self._listen())

    @property
    def pid(self) -> int:
        """The outermost process."""
        return self.process.pid

    async def _listen(self) -> None:
        """Read stderr, so that a full pipe never blocks the worker, and keep its end."""
        assert self.process.stderr is not None
        while data := await self.process.stderr.read(LAST_WORDS_BYTES // 16):
            self._stderr_end.append(data)

    async def last_words(self) -> str:
        """The last lines of the worker's stderr, joined to one; waits a moment for a dying worker to finish."""
        await asyncio.wait([self._listener], timeout=STOP_GRACE_S)
        lines = b"".join(self._stderr_end).decode(errors="replace").strip().split("\n")
        return " | ".join(line.strip() for line in lines[-4:])

    def _memory_kills(self) -> int:
        """How many of its processes the kernel has killed because memory ran out; 0 without a group."""
        return self.group.oom_kills() if self.group is not None else 0

    def begin_call(self) -> None:
        """Forget the kills under earlier programs: from now on `ran_out_of_memory` is about the new call."""
        self._kills_before = self._memory_kills()

    def ran_out_of_memory(self) -> bool:
        """Whether the kernel killed a process of the worker because memory ran out since the call began.

        Call it before `stop`, which removes the counter.
        """
        return self._stopped is None and self._memory_kills() > self._kills_before

    async def why_dead(self) -> str:
        """What ended a dead worker: "killed" if somebody outside sent a signal, "broken" if it ended by itself, else
        "died".

        A program cannot signal the processes of its sandbox, and with a memory group the kernel's own kills are known
        (see `ran_out_of_memory`).
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.process.wait()), STOP_GRACE_S)
        code = self.process.returncode
        if self.group is None or code in (None, 0):  # 0: the supervisor ended normally, because its input ended
            return "died"
        number = -code if code < 0 else code - 128  # a launcher whose child was ended by a signal exits as a shell does
        return "killed" if 0 < number < signal.NSIG and number not in CRASH_SIGNALS else "broken"

    def note_machinery(self) -> None:
        """Note the processes that run before the first program; a program cannot stop them."""
        self.machinery = {pid: seen.started for pid, seen in self._look().items() if seen.state != "T"}

    async def why_hung(self) -> str:
        """Why there is no answer long after a program's time limit.

        "stopped" or "killed" if somebody outside did that to a process of the machinery, which a program cannot do;
        else "overrun" if the program's processes keep the processor busy or have many threads; else "hung". Many
        threads at the first of two looks are enough, because they may be ending at the second.
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
        """The ids of its processes, as the host numbers them."""
        return self.group.processes() if self.group is not None else family(self.pid)

    def move(self, cores: set[int]) -> None:
        """Move all its threads to these cores."""
        for _ in range(2):  # a thread that starts meanwhile inherits the cores of the one that starts it
            for pid in self.processes():
                with suppress(OSError):  # it ended meanwhile
                    for thread in os.listdir(f"/proc/{pid}/task"):
                        os.sched_setaffinity(int(thread), cores)

    def memory_mb(self) -> float | None:
        """Memory in use now, MiB: of the cgroup, or else `proportional_mb`; None if unknown."""
        if self.group is not None:
            return self.group.usage_mb()
        return proportional_mb(self.pid)

    async def stop(self) -> None:
        """End the worker with all that is in it, and remove what was made for it. Safe on a dead one, or twice."""
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
            with suppress(TimeoutError):  # its owner does not wait longer for a process that the kernel cannot end now
                await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        await self.tidy()
        if self.group is not None:
            await self.group.remove()
        self._listener.cancel()


async def nothing() -> None:
    """The `tidy` of a launcher that has nothing to remove."""


def supervisor_command(interpreter: str, inside: str, /, **setup: object) -> list[str]:
    """The command line of the supervisor; `setup` holds the other settings that `inside/supervisor.py` describes."""
    setup = {"owner": owner_tag(), "tiers": TIERS, **setup}
    # -S skips `site` and its .pth files, some of which run code (20 ms and more).
    return [interpreter, "-I", "-S", f"{inside}/supervisor.py", json.dumps(setup)]


def undone_if_cancelled(launch: Callable[P, Awaitable[Worker]]) -> Callable[P, Awaitable[Worker]]:
    """If the start of a worker is cancelled, finish it, stop that worker, and only then raise the cancellation.

    If asyncio is cancelled between the fork and the pipes to the child, it may wait for these pipes for ever. And
    nobody would remove what was made for a worker that is not there yet.
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
    """Start a worker's outermost process, which is in `group` from its first instruction on.

    keep: further descriptors that it inherits. If the start fails, `tidy` runs, the group is removed, and OSError is
    raised.
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
            start_new_session=True,  # Ctrl-C in a terminal reaches only the trainer, which then closes the sandbox
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
