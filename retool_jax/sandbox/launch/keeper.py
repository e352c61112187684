"""Ends a gVisor worker, in whatever state it is, and removes all of it: processes, control groups, files.

A program of its own, `python -I -S keeper.py FOLDER ...`, with nothing but the standard library: next to each worker a
shell waits to run it as soon as the worker's owner closes its end of a pipe, by will or by death. All it needs is the
worker's folder: the name of the folder is the container's, the processes have `--root=FOLDER/state` on their command
line, and the file `cgroups` in it lists the control groups.
"""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# What a shell that waits to run this program is called: `sh -c ... SHELL python -I -S keeper.py FOLDER`.
SHELL = "retool-sandbox-keeper"
DEADLINE_S = 5.0
RUNNER_GRACE_S = 0.3


def cgroups(folder: Path) -> list[Path]:
    """The control groups of the worker that are there, innermost first."""
    try:
        names = (folder / "cgroups").read_text().splitlines()
    except OSError:
        return []
    return [path for name in names if (path := Path(name)).is_dir()]


def processes(folder: Path) -> tuple[list[int], list[int]]:
    """The worker's processes: those that run the sandbox, and those that watch it: `runsc` commands, and other keepers
    that still wait (a stopped one would wait for ever)."""
    mark = f"\0--root={folder}/state\0"
    sandbox, watchers = set(), set()
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with suppress(OSError):  # it ended meanwhile
            command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
            if mark in command:
                (sandbox if command.startswith("runsc-") else watchers).add(int(name))
            elif f"\0{SHELL}\0" in command and command.endswith(f"\0{folder}\0"):
                watchers.add(int(name))
    for group in cgroups(folder):
        with suppress(OSError):
            sandbox |= set(map(int, (group / "cgroup.procs").read_text().split()))
    return sorted(sandbox - watchers), sorted(watchers)


def kill_all(folder: Path, deadline: float) -> bool:
    """Kill the worker's processes by their ids; returns whether they are gone.

    `runsc kill` would ask the sandbox's kernel for its consent, and wait for ever if that is stopped. Its watchers get
    a moment more, to put their own affairs in order.
    """
    grace = time.monotonic() + RUNNER_GRACE_S
    for pause in pauses():
        if time.monotonic() > deadline:
            return False
        sandbox, watchers = processes(folder)
        if not sandbox and not watchers:
            return True
        for pid in sandbox + (watchers if time.monotonic() > grace else []):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause)


def pauses() -> Iterator[float]:
    """Seconds between two looks, more and more: each look is at every process of the machine."""
    pause = 0.005
    while True:
        yield pause
        pause = min(2 * pause, 0.08)


def remove_cgroups(folder: Path, deadline: float) -> bool:
    """Remove the worker's control groups; returns whether they are gone."""
    while groups := cgroups(folder):
        if time.monotonic() > deadline:
            return False
        for group in groups:
            with suppress(OSError):  # busy until the kernel has buried the last process
                group.rmdir()
        time.sleep(0.005)
    return True


def remove(folder: Path) -> bool:
    """Kill the worker and remove all of it; returns whether nothing is left."""
    deadline = time.monotonic() + DEADLINE_S
    dead = kill_all(folder, deadline)
    bare = remove_cgroups(folder, deadline)
    if not (dead and bare):
        return False  # the folder is what a later sweep finds it by
    shutil.rmtree(folder, ignore_errors=True)  # all else that `runsc delete` would do, and that can take it seconds
    with suppress(OSError):  # not empty: other workers are there
        folder.parent.rmdir()
    return not folder.exists()


if __name__ == "__main__":
    sys.exit(not all([remove(Path(argument)) for argument in sys.argv[1:]]))
