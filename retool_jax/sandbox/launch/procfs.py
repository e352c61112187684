"""Processes of this machine, as the kernel tells of them: what they do, and whose workers they are.

Everything that an owner makes on the machine carries its tag, so that a later one can tell what a dead one left.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")


def stat_fields(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on. Before that is its name, which may be any bytes.

    Raises OSError if there is none.
    """
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


def machine_memory_mb() -> int:
    """MiB that this machine, or the control group that this process is in, has in all."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such group, or "max"
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there >> 20


def started_at(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none. With the pid, its unique name."""
    seen = look_at(pid)
    return None if seen is None or seen.state in "ZX" else seen.started


class Seen(NamedTuple):
    """A process, looked at from the host."""

    state: str  # T where somebody has stopped it
    cpu_s: float  # processor time of it and of the children it waited for
    threads: int
    started: int  # as `started_at`, for a number is given again once its process has ended


def look_at(pid: int) -> Seen | None:
    """What a process is doing; None if there is none."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return Seen(fields[0], sum(map(int, fields[11:15])) / TICKS, int(fields[17]), int(fields[19]))


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        with suppress(OSError):  # it ended meanwhile
            for thread in os.listdir(f"/proc/{member}/task"):
                with suppress(OSError):
                    found += map(int, Path(f"/proc/{member}/task/{thread}/children").read_text().split())
    return found


def proportional_mb(pid: int) -> float | None:
    """Memory of a process and its descendants, MiB, pages shared by n processes counted as 1/n."""
    total = 0
    try:
        for member in family(pid):
            with open(f"/proc/{member}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
    return total / 1024


async def gone(pids: Sequence[int], timeout_s: float = 2.0) -> bool:
    """Wait until none of these processes is left."""
    deadline = time.monotonic() + timeout_s
    while any(started_at(pid) is not None for pid in pids):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Owners
# ---------------------------------------------------------------------------------------------------------------------


def owner_tag() -> str:
    """The name of this process in all that it leaves on the machine, so that a later one can tell it is dead."""
    return f"retool-{os.getpid()}-{started_at(os.getpid())}"


def owner_is_gone(tag: str) -> bool:
    """Whether `tag` names a process that no longer exists; False for what is no tag at all."""
    match = re.fullmatch(r"retool-(\d+)-(\d+)", tag)
    return match is not None and started_at(int(match[1])) != int(match[2])


def stale_workers() -> list[int]:
    """Processes of workers whose owner is dead: a stopped one cannot notice that its input has ended."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid != os.geteuid():
                continue
            command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
            owner = re.search(r'supervisor\.py\0.*"owner": "(retool-\d+-\d+)"', command)
            if owner and owner_is_gone(owner[1]):
                found.append(int(name))
    return found


async def kill_stale_workers() -> int:
    """Kill what `stale_workers` finds, and wait until it is gone; returns how many."""
    stale = stale_workers()
    for pid in stale:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    await gone(stale)
    return len(stale)
