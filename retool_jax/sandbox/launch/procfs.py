"""Processes of this machine, read from /proc: their state, and which of them are workers of which owner.

Everything that an owner makes on the machine carries its tag, so that a later owner can recognize what a dead one left.
"""

import asyncio
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

TICKS = os.sysconf("SC_CLK_TCK")
GONE_S = 2.0  # how long killed processes may take to end


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on. (The name before it may be any bytes.)

    Raises OSError if there is no such process.
    """
    return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()


def machine_memory_mb() -> int:
    """Total memory of this machine, or of the control group of this process if that is less, in MiB."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such group, or "max"
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there >> 20


def started_at(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if it is dead. Unique together with the pid."""
    seen = look_at(pid)
    return None if seen is None or seen.state in "ZX" else seen.started


class Seen(NamedTuple):
    """The state of a process, seen from the host."""

    state: str  # T if somebody has stopped it
    cpu_s: float  # processor time of it and of the children it waited for
    threads: int
    started: int  # as in `started_at`: the kernel reuses the number of a process that has ended


def look_at(pid: int) -> Seen | None:
    """The state of a process; None if there is none."""
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
    """Memory of a process and its descendants, MiB; a page that n processes share counts 1/n. None if unknown."""
    total = 0
    try:
        for member in family(pid):
            with open(f"/proc/{member}/smaps_rollup") as file:
                total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
    except (OSError, StopIteration):
        return None
    return total / 1024


# ---------------------------------------------------------------------------------------------------------------------
# Owners
# ---------------------------------------------------------------------------------------------------------------------


def owner_tag() -> str:
    """The name of this process in all that it makes on the machine, by which others can tell that it is dead."""
    return f"retool-{os.getpid()}-{started_at(os.getpid())}"


def owner_is_gone(tag: str) -> bool:
    """Whether `tag` names a process that no longer exists; False if it is not a tag."""
    match = re.fullmatch(r"retool-(\d+)-(\d+)", tag)
    return match is not None and started_at(int(match[1])) != int(match[2])


def stale_workers() -> list[int]:
    """Processes of workers whose owner is dead (a stopped worker cannot notice that its input has ended)."""
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
    """Kill what `stale_workers` finds and wait up to `GONE_S` until it is gone; returns the number."""
    stale = stale_workers()
    for pid in stale:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + GONE_S
    while any(started_at(pid) is not None for pid in stale) and time.monotonic() <= deadline:
        await asyncio.sleep(0.01)
    return len(stale)
