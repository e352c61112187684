"""Control groups: limits on the memory and the processor time of a worker, in version 1 and 2 of the interface.

The groups of a process lie in its own folder, `retool-PID-START`, below the group that it runs in (below an ancestor
where the rules of version 2 require that), so that the groups of a dead owner can be recognized and removed.
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
    """A place for memory groups."""

    path: Path  # the group under which ours are made
    unified: bool  # version 2 of the interface


def _hierarchies(controller: str) -> list[tuple[Path, Path, bool]]:
    """(mount point, group of this process, unified) of each mounted hierarchy that may offer a controller."""
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
        group = Path(mount) / os.path.relpath(path, root)  # a container sees only the part below `root`
        found.append((Path(mount), group if group.is_dir() else Path(mount), unified))
    return found


def _around(mount: Path, group: Path) -> list[Path]:
    """A group and those around it, up to the mount point."""
    return [group, *group.parents][: len(group.relative_to(mount).parts) + 1]


def _offers(controller: str, folder: Path) -> bool:
    """Whether groups in this folder of a version 2 hierarchy get a controller; turns it on if necessary."""
    control = folder / "cgroup.subtree_control"
    with suppress(OSError):
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")  # refused if the group holds processes, except in the root
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
        for folder in _around(mount, own) if unified else [own]:
            if os.access(folder, os.W_OK) and (not unified or _offers("memory", folder)):
                return MemoryFolder(folder, unified)
    return None


@cache
def cpu_folder() -> Path | None:
    """Where this process can make groups for processor time, in version 1 only; None if nowhere."""
    with suppress(OSError, ValueError):
        for _, own, unified in _hierarchies("cpu"):
            if not unified and os.access(own, os.W_OK):
                return own
    return None


def has_processor_quota() -> bool:
    """Whether this process, or a group around it, may use less processor time than its cores have."""
    with suppress(OSError, ValueError):
        for mount, own, unified in _hierarchies("cpu"):
            for folder in _around(mount, own):
                with suppress(OSError):  # the root group has no such file in version 2
                    names = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota, period = " ".join((folder / name).read_text() for name in names).split()
                    if quota not in ("max", "-1") and int(quota) < int(period) * len(os.sched_getaffinity(0)):
                        return True
    return False


class WorkerGroup:
    """A group with a limit on its memory, swap included, and on its processor time (one core), if that can be set.

    Raises OSError if it cannot be made.
    """

    def __init__(self, owner: str, limit_mb: int):
        """owner: name of the folder around it, which begins with the tag of the owning process."""
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
                if (self.path / name).exists():  # the file for swap depends on how the kernel was built
                    (self.path / name).write_text(str(limit_mb << 20))
            if self.unified:
                with suppress(OSError):
                    (self.path / "memory.swap.max").write_text("0")
        except BaseException:
            self.path.rmdir()
            raise
        with suppress(OSError):  # the limit on processor time is optional
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
        """Files of the group: a process with one thread that writes 0 into each of them enters it.

        In version 1 this is the file for threads: with the file for processes the kernel stops all forks for 12 ms.
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
        """Memory charged now, MiB, without file pages that the kernel can drop at any time."""
        used = self._number("memory.current" if self.unified else "memory.usage_in_bytes")
        with suppress(OSError):
            for line in (self.path / "memory.stat").read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == ("inactive_file" if self.unified else "total_inactive_file"):
                    used -= int(value)
        return used / (1 << 20) if used else None

    def oom_kills(self) -> int:
        """How many processes of this group the kernel has killed because memory ran out."""
        with suppress(OSError):
            for line in self.events.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
        return 0

    def processes(self) -> list[int]:
        """The processes in the group and below it."""
        return _processes(self.path)

    async def remove(self) -> None:
        """Kill the processes in the group and remove it, and the owner's folder if it is empty then; never raises."""
        for path in (self.path, self.cpu_path):
            if path is not None:
                await asyncio.to_thread(_remove, path)
                with suppress(OSError):
                    path.parent.rmdir()


def _make(parent: Path) -> Path:
    """A new group in `parent`, a folder that is removed with the last group in it."""
    path = parent / str(next(_numbers))
    while True:
        parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # `parent` has just been removed
            path.mkdir()
            return path


def _processes(folder: Path) -> list[int]:
    found = []
    for where, _, _ in os.walk(folder):
        with suppress(OSError):
            found += map(int, Path(where, "cgroup.procs").read_text().split())
    return found


def _remove(folder: Path) -> None:
    """Kill and remove a group, within `REMOVE_S`; the kernel may take 10 ms, which is too long in an event loop."""
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
    """The folders' names of all processes that have groups here, dead or alive."""
    return list({path.name for folder in _folders() for path in folder.glob("retool-*-*") if path.is_dir()})


async def remove_owner(tag: str) -> None:
    """Kill and remove all groups of one owner."""
    for folder in _folders():
        await asyncio.to_thread(_remove, folder / tag)
