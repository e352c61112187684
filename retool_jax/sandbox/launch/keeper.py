"""Ends a gVisor worker, whatever its state, and removes its processes, control groups and files.

This is a separate program, `python -I -S keeper.py FOLDER ...`, which uses only the standard library. Next to each
worker a shell waits to run it as soon as the worker's owner closes a pipe or dies. It needs only the worker's folder:
the folder has the name of the container, the processes have `--root=FOLDER/state` on their command line, and the file
`cgroups` in the folder lists the control groups.
"""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

# Name of a shell that waits to run this program: `sh -c ... SHELL python -I -S keeper.py FOLDER`.
SHELL = "retool-sandbox-keeper"
DEADLINE_S = 5.0
RUNNER_GRACE_S = 0.3


def cgroups(folder: Path) -> list[Path]:
    """The control groups of the worker that exist, innermost first."""
    try:
        names = (folder / "cgroups").read_text().splitlines()
    except OSError:
        return []
    return [path for name in names if (path := Path(name)).is_dir()]


def processes(folder: Path) -> tuple[list[int], list[int]]:
    """The worker's processes: first those that run the sandbox, then those that watch it, which are `runsc` commands
    and other keepers that still wait (a stopped one would wait for ever)."""
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

    `runsc kill` would ask the sandbox's kernel, and wait for ever if that is stopped. The watchers are killed only
    `RUNNER_GRACE_S` later, so that they can clean up themselves.
    """
    grace, pause = time.monotonic() + RUNNER_GRACE_S, 0.005
    while time.monotonic() <= deadline:
        sandbox, watchers = processes(folder)
        if not sandbox and not watchers:
            return True
        for pid in sandbox + (watchers if time.monotonic() > grace else []):
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.08)  # each look reads every process of the machine
    return False


def remove_cgroups(folder: Path, deadline: float) -> bool:
    """Remove the worker's control groups; returns whether they are gone."""
    while groups := cgroups(folder):
        if time.monotonic() > deadline:
            return False
        for group in groups:
            with suppress(OSError):  # busy until the kernel has removed the last process
                group.rmdir()
        time.sleep(0.005)
    return True


def remove(folder: Path) -> bool:
    """Kill the worker and remove everything of it; returns whether nothing is left."""
    deadline = time.monotonic() + DEADLINE_S
    processes_gone = kill_all(folder, deadline)
    cgroups_gone = remove_cgroups(folder, deadline)
    if not (processes_gone and cgroups_gone):
        return False  # the folder stays, so that a later sweep finds the worker
    shutil.rmtree(folder, ignore_errors=True)  # as `runsc delete` would, which can take seconds
    with suppress(OSError):  # not empty: it holds other workers
        folder.parent.rmdir()
    return not folder.exists()


if __name__ == "__main__":
    sys.exit(not all([remove(Path(argument)) for argument in sys.argv[1:]]))
