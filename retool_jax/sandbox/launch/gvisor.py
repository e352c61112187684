"""The `gvisor` back-end: a worker is a gVisor sandbox, whose own kernel serves its programs' system calls.

Programs see a read-only root file system, which holds the runtime and nothing else of the host, and a network without
devices. As root, control groups limit the memory and the processor time of the whole sandbox; an ordinary user has only
the limits per process. The program `keeper` removes a worker.

Workers are not restored from checkpoints, although `runsc restore` works: with numpy and sympy in the image it took
0.8 s and 0.8 CPU seconds until the first answer; a cold start with both takes 1.5 s. Workers are rarely replaced, and
a checkpoint fits only one build, one set of flags and one memory limit.
"""

import asyncio
import functools
import itertools
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from retool_jax.errors import UserError
from retool_jax.sandbox.launch import keeper
from retool_jax.sandbox.launch.cgroup import WorkerGroup, memory_folder, owners, remove_owner
from retool_jax.sandbox.launch.procfs import owner_is_gone, owner_tag
from retool_jax.sandbox.launch.runtime import INSIDE_TARGET, Runtime, find_runtime
from retool_jax.sandbox.launch.worker import (
    CAPABILITIES,
    ENVIRONMENT,
    INSIDE,
    Worker,
    start,
    supervisor_command,
    undone_if_cancelled,
)
from retool_jax.sandbox.types import SandboxConfig

PROMISES = frozenset({"files", "network", "memory", "environment", "processes"})
COUNTS_CORES = True  # so a worker moves to a single core only after its start: see `two_cores`
INSTALL = "install gVisor: apt-get install runsc (elsewhere: https://gvisor.dev/docs/user_guide/install)"
PLATFORMS = ("systrap", "ptrace")  # in order of preference; never kvm, which needs a device and hangs on some machines
PROBE_S = 5.0
REMOVE_S = 12.0
OVERHEAD_MB = 384  # what gVisor's kernel and the fork servers take on top of a program

_numbers = itertools.count()


class Build(NamedTuple):
    """What the installed `runsc` can do."""

    path: str
    version: str
    platform: str
    flags: tuple[str, ...]


@functools.cache
def probe() -> Build:
    """Ask `runsc` what it can do. Raises UserError if it is missing or offers none of `PLATFORMS`."""
    path = shutil.which("runsc")
    if path is None:
        raise UserError(f"there is no runsc; {INSTALL}")

    def ask(*arguments: str) -> str:
        command = [path, *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise UserError(f"{' '.join(command)} failed ({error}); {INSTALL}") from None
        return done.stdout + done.stderr

    offered = ask("help", "platforms").split()
    platform = next((name for name in PLATFORMS if name in offered), None)
    if platform is None:
        raise UserError(f"{path} offers the platforms {offered}, none of {list(PLATFORMS)}; {INSTALL}")
    flags = [f"--platform={platform}"]
    if "-overlay2" in re.findall(r"^ *(-[\w-]+)", ask("flags"), re.MULTILINE):
        flags.append("--overlay2=none")  # newer builds would put a writable layer over the root
    version = re.search(r"version (\S+)", ask("--version"))
    return Build(path, version[1] if version else "unknown", platform, tuple(flags))


def missing(config: SandboxConfig) -> str:
    """Why this back-end cannot work here, and what to do; empty if nothing is known to prevent it."""
    if sys.platform != "linux":
        return f"gVisor needs Linux, this is {sys.platform}"
    try:
        probe()
        find_runtime(config.image)
    except UserError as error:
        return str(error)
    return ""


def base_folder() -> Path:
    """Where this user's workers have their folders; made with the first one and removed with the last."""
    return Path("/run/retool-sandbox") if os.geteuid() == 0 else Path(f"/tmp/retool-sandbox-{os.geteuid()}")


def make_folder(name: str) -> Path:
    """Make a worker's own folder. Raises UserError if the folder around it belongs to somebody else."""
    base = base_folder()
    while True:
        try:
            base.mkdir(mode=0o700, exist_ok=True)
            status = base.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise UserError(f"{base} is not a private folder of this user; remove it")
            (base / name).mkdir(mode=0o700)
            return base / name
        except FileNotFoundError:  # it was removed with the last worker just now
            continue
        except FileExistsError:
            raise UserError(f"{base} is not a folder; remove it") from None
        except PermissionError as error:
            raise UserError(f"cannot make {base} ({error.strerror}); the sandbox keeps its state there") from None


def make_spec(runtime: Runtime, root: str, memory_mb: int) -> dict:
    """The OCI configuration of a worker with the root folder `root`, for programs of up to `memory_mb`."""
    binds = {path: path for path in runtime.binds} | {INSIDE_TARGET: str(INSIDE)}
    command = supervisor_command(
        runtime.python, INSIDE_TARGET, packages=runtime.packages, python=runtime.version, memory_mb=memory_mb
    )
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": command,
            "env": [f"{key}={value}" for key, value in ENVIRONMENT.items()],
            "cwd": "/",
            "capabilities": {kind: CAPABILITIES for kind in ("bounding", "effective", "permitted")},
            "noNewPrivileges": True,
        },
        "root": {"path": root, "readonly": True},
        "hostname": "sandbox",
        "mounts": [
            {"type": "proc", "source": "proc", "destination": "/proc"},
            {"type": "tmpfs", "source": "tmpfs", "destination": "/tmp", "options": ["mode=0755"]},
            *(
                {"type": "bind", "source": source, "destination": target, "options": ["rbind", "ro"]}
                for target, source in binds.items()
            ),
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        },
    }


def make_root(runtime: Runtime, folder: Path) -> Path:
    """The root folder of a worker: that of the image, or one below `folder` that holds only links."""
    if runtime.root is not None:
        return runtime.root
    root = folder / "root"
    for target, link in (*runtime.links, ("/tmp", "/var/tmp")):
        path = root / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return root


async def _start_keeper(folder: Path, stdin: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    """Start a shell that runs the keeper when its input ends, because this process closes it or dies."""
    return await asyncio.create_subprocess_exec(
        *("/bin/sh", "-c", 'read _; exec "$@"', keeper.SHELL),
        *(sys.executable, "-I", "-S", keeper.__file__, str(folder)),
        stdin=stdin,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


async def _remove(folder: Path, first: asyncio.subprocess.Process | None = None) -> None:
    """Have the worker's keeper remove it; if that one is dead or stuck, another keeper does."""
    for running in (first, None):
        process = running or await _start_keeper(folder, asyncio.subprocess.DEVNULL)
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(REMOVE_S):
                if await process.wait() == 0:
                    return
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()


def two_cores() -> list[str]:
    """Words before a command that start it on two cores, if the machine has more.

    gVisor's kernel configures itself for the cores that it sees, and stays so when it is moved to a single one.
    Configured for one core, its threads often wait for a timer before they wake each other, while the core is idle: the
    slowest tenth of print calls took 34 ms and more, not 25. Configured for many cores, it has threads for each.
    """
    cores, taskset = sorted(os.sched_getaffinity(0)), shutil.which("taskset")
    if len(cores) <= 2 or taskset is None:
        return []
    return [taskset, "--cpu-list", ",".join(map(str, random.SystemRandom().sample(cores, 2)))]


@undone_if_cancelled
async def launch(config: SandboxConfig, memory_mb: int) -> Worker:
    """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""
    build, runtime = await asyncio.to_thread(lambda: (probe(), find_runtime(config.image)))
    name = f"{owner_tag()}-{next(_numbers)}"
    folder = make_folder(name)
    guard, group = None, None
    try:
        guard = await _start_keeper(folder)
        (folder / "state").mkdir()
        root = make_root(runtime, folder)
        if memory_folder():  # each worker has a folder of groups to itself, so nobody removes it while a worker is made
            group = WorkerGroup(name, memory_mb + OVERHEAD_MB)
            (folder / "cgroups").write_text("\n".join(map(str, group.folders)))
        (folder / "config.json").write_text(json.dumps(make_spec(runtime, str(root), memory_mb)))
    except BaseException:
        if guard is None:  # the folder is still empty, and another keeper would not start either
            with suppress(OSError):
                folder.rmdir()
                folder.parent.rmdir()
        else:
            await _remove(folder, guard)
        if group is not None:
            await group.remove()
        raise
    return await start(
        [
            *two_cores(),
            *(build.path, f"--root={folder}/state", "--network=none", "--file-access-mounts=exclusive", *build.flags),
            # runsc's own groups would add a level in each hierarchy, and entering them stops all forks of the machine.
            "--ignore-cgroups",
            *(() if os.geteuid() == 0 else ("--rootless",)),
            *("run", f"--bundle={folder}", name),
        ],
        group=group,
        tidy=lambda: _remove(folder, guard),
    )


async def sweep_stale() -> int:
    """Remove what dead owners left; returns the number of their workers. Workers of live owners are not touched."""
    found = [folder for folder in base_folder().glob("retool-*") if owner_is_gone(folder.name.rpartition("-")[0])]
    for folder in found:
        await _remove(folder)
    for name in owners():  # groups whose folder is gone
        if owner_is_gone(name.rpartition("-")[0]):
            await remove_owner(name)
    return len(found)


def describe(isolation: dict[str, bool]) -> str:
    """One line for people about the back-end."""
    build = probe()
    bounds = "memory bounded as a whole" if memory_folder() else "memory bounded per process only"
    return f"gvisor: runsc {build.version} on {build.platform}, own kernel, no network, host files hidden, {bounds}"
