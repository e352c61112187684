"""Control groups: limits on the memory and the processor time of a worker, in either version of the interface.

The groups of one process lie in a folder of its own, `retool-PID-START`, below the group that it runs in (below an
ancestor where version 2's rules want that), so that what a dead owner left can be told and removed.
"""

import asyncio
import os
import signal
import time
from contextlib import suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

REMOVE_S = 2.0
PERIOD_US = 100_000
_numbers = count(1)


class MemoryFolder(NamedTuple):
    """Where memory groups can be made."""

    path: Path  # the group under which ours are made
    unified: bool  # version 2 of the interface


def _hierarchies(controller: str) -> list[tuple[Path, Path, bool]]:
    """(mount point, this process's group, unified) of each mounted hierarchy that could hold groups of a controller."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split()[:3]
        if kind == "cgroup" and controller in options.split(","):
            path, unified = own.get(controller, "/"), False
        elif kind == "cgroup2":
            path, unified = own.get("", "/"), True
        else:
            continue
        group = Path(mount) / os.path.relpath(path, root)  # a container sees the part below `root` only
        found.append((Path(mount), group if group.is_dir() else Path(mount), unified))
    return found


def _offers(controller: str, folder: Path) -> bool:
    """Whether groups made in this folder of a version 2 hierarchy get a controller; asks for it if need be."""
    control = folder / "cgroup.subtree_control"
    with suppress(OSError):
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")  # refused while the group holds processes, unless it is the root
        return True
    return False


@cache
def memory_folder() -> MemoryFolder | None:
    """Where this process can make memory groups; None if nowhere."""
    try:
        hierarchies = _hierarchies("memory")
    except (OSError, ValueError):
        return None
    for mount, own, unified in hierarchies:
        candidates = [own, *own.parents][: len(own.relative_to(mount).parts) + 1] if unified else [own]
        for folder in candidates:
            if os.access(folder, os.W_OK) and (not unified or _offers("memory", folder)):
                return MemoryFolder(folder, unified)
    return None


@cache
def cpu_folder() -> Path | None:
    """Where this process can make groups for processor time in version 1; None if nowhere."""
    with suppress(OSError, ValueError):
        for _, own, unified in _hierarchies("cpu"):
            if not unified and os.access(own, os.W_OK):
                return own
    return None


def has_processor_quota() -> bool:
    """Whether this process, or a group around it, may use less processor time than the cores have that it sees."""
    with suppress(OSError, ValueError):
        for mount, own, unified in _hierarchies("cpu"):
            for folder in [own, *own.parents][: len(own.relative_to(mount).parts) + 1]:
                with suppress(OSError):  # the root group has no such file in version 2
                    names = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    if quota not in ("max", "-1") and int(quota) < int(period) * len(os.sched_getaffinity(0)):
                        return True
    return False


class WorkerGroup:
    """A group with a limit on its memory, swap included, and with the time of one core where that can be set.

    Raises OSError if it cannot be made.
    """

    def __init__(self, owner: str, limit_mb: int):
        """owner: the tag of the process that it belongs to, which names the folder around it."""
        folder = memory_folder()
        if folder is None:
            raise OSError("no memory control group can be made here")
        self.unified = folder.unified
        self.parent = folder.path / owner
        self.path = _make(self.parent)
        self.cpu_path: Path | None = None
        try:
            if self.unified and not _offers("memory", self.parent):
                raise OSError(f"{self.parent} does not offer memory limits")
            for name in ("memory.max",) if self.unified else ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
                if (self.path / name).exists():  # the one for swap is an option of the kernel
                    (self.path / name).write_text(str(limit_mb << 20))
            if self.unified:
                with suppress(OSError):
                    (self.path / "memory.swap.max").write_text("0")
        except BaseException:
            self.path.rmdir()
            raise
        with suppress(OSError):  # a limit on processor time is welcome, not needed
            if not self.unified and (cpu := cpu_folder()):
                self.cpu_path = _make(cpu / owner)
                (self.cpu_path / "cpu.cfs_period_us").write_text(str(PERIOD_US))
                (self.cpu_path / "cpu.cfs_quota_us").write_text(str(PERIOD_US))
            elif self.unified and _offers("cpu", self.path.parent.parent) and _offers("cpu", self.parent):
                (self.path / "cpu.max").write_text(f"{PERIOD_US} {PERIOD_US}")

    @property
    def folders(self) -> list[Path]:
        """All folders that were made for it, innermost first."""
        return [folder for path in (self.path, self.cpu_path) if path is not None for folder in (path, path.parent)]

    @property
    def entrances(self) -> list[Path]:
        """A process with one thread that writes 0 into these files enters the group.

        In version 1 by the file for threads: with the one for processes the kernel stops all forks for 12 ms.
        """
        name = "cgroup.procs" if self.unified else "tasks"
        return [path / name for path in (self.path, self.cpu_path) if path is not None]

    @property
    def events(self) -> Path:
        """The file with the line `oom_kill N`."""
        return self.path / ("memory.events" if self.unified else "memory.oom_control")

    def _number(self, name: str) -> int:
        try:
            return int((self.path / name).read_text())
        except (OSError, ValueError):
            return 0

    def usage_mb(self) -> float | None:
        """Memory charged now, MiB, without file pages that the kernel can drop at will."""
        used = self._number("memory.current" if self.unified else "memory.usage_in_bytes")
        with suppress(OSError):
            for line in (self.path / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == ("inactive_file" if self.unified else "total_inactive_file"):
                    used -= int(value)
        return used / (1 << 20) if used else None

    def oom_kills(self) -> int:
        """Processes of this group that the kernel killed for want of memory."""
        with suppress(OSError):
            for line in self.events.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def processes(self) -> list[int]:
        """What runs in the group and below it."""
        return _processes(self.path)

    async def remove(self) -> None:
        """Kill what is left in the group and remove it, and the owner's folder if it was the last; never raises."""
        for path in (self.path, self.cpu_path):
            if path is not None:
                await asyncio.to_thread(_remove, path)
                with suppress(OSError):
                    path.parent.rmdir()


def _make(parent: Path) -> Path:
    """A new group in `parent`, which goes with the last one in it."""
    path = parent / str(next(_numbers))
    while True:
        parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # the last one has just gone
            path.mkdir()
            return path


def _processes(folder: Path) -> list[int]:
    found = []
    for where, _, _ in os.walk(folder):
        with suppress(OSError):
            found += map(int, Path(where, "cgroup.procs").read_text().split())
    return found


def _remove(folder: Path) -> None:
    """Kill and remove, within a time; the kernel may take 10 ms for it, which is much to an event loop."""
    deadline = time.monotonic() + REMOVE_S
    while folder.is_dir() and time.monotonic() < deadline:
        for pid in _processes(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for where, _, _ in os.walk(folder, topdown=False):
            with suppress(OSError):
                os.rmdir(where)
        if folder.is_dir():
            time.sleep(0.01)


def _folders() -> list[Path]:
    memory = memory_folder()
    return [folder for folder in (memory and memory.path, cpu_folder()) if folder is not None]


def owners() -> list[str]:
    """The tags of all processes that have groups here, dead or alive."""
    return list({path.name for folder in _folders() for path in folder.glob("retool-*-*") if path.is_dir()})


async def remove_owner(tag: str) -> None:
    """Kill and remove all groups of one owner."""
    for folder in _folders():
        await asyncio.to_thread(_remove, folder / tag)
