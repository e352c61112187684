"""The `gvisor` back-end: a worker is a gVisor sandbox, whose kernel is a program of its own between ours and theirs.

Programs see a root file system that cannot be written, with the runtime and nothing else of the host in it, and a
network without devices. As root, control groups bound the memory and the processor time of the whole sandbox; an
ordinary user has to do with the limits per process. `keeper` is the program that removes a worker.

Workers are not restored from checkpoints, though `runsc restore` works: with numpy and sympy in the image it took 0.8 s
and 0.8 CPU seconds until the first answer, a cold start with both takes 1.5 s. Workers are rarely replaced, and an
image is good for one build, one set of flags and one memory limit only.
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
COUNTS_CORES = True  # so it is put on a single core only when it is up: see `two_cores`
INSTALL = "install gVisor: apt-get install runsc (elsewhere: https://gvisor.dev/docs/user_guide/install)"
PLATFORMS = ("systrap", "ptrace")  # by preference; never kvm, which needs a device and hangs on some machines
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
    """Ask `runsc` what it is. Raises UserError if it is missing or has no platform that is used here."""
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
    """Why the back-end cannot work here and what to do about it; "" if nothing is known to be in its way."""
    if sys.platform != "linux":
        return f"gVisor needs Linux, this is {sys.platform}"
    try:
        probe()
        find_runtime(config.image)
    except UserError as error:
        return str(error)
    return ""


def base_folder() -> Path:
    """Where this user's workers have their folders; it comes with the first of them and goes with the last."""
    return Path("/run/retool-sandbox") if os.geteuid() == 0 else Path(f"/tmp/retool-sandbox-{os.geteuid()}")


def make_folder(name: str) -> Path:
    """A worker's own folder. Raises UserError if the one around it is somebody else's."""
    base = base_folder()
    while True:
        try:
            base.mkdir(mode=0o700, exist_ok=True)
            status = base.lstat()
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
                raise UserError(f"{base} is not a private folder of this user; remove it")
            (base / name).mkdir(mode=0o700)
            return base / name
        except FileNotFoundError:  # the last worker has just left
            continue
        except FileExistsError:
            raise UserError(f"{base} is not a folder; remove it") from None
        except PermissionError as error:
            raise UserError(f"cannot make {base} ({error.strerror}); the sandbox keeps its state there") from None


def make_spec(runtime: Runtime, root: str, memory_mb: int) -> dict:
    """The OCI configuration of a worker on the root folder `root`, for programs of up to `memory_mb`."""
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
    """The root folder of a worker: the image's, or one below `folder` with nothing in it but links."""
    if runtime.root is not None:
        return runtime.root
    root = folder / "root"
    for target, link in (*runtime.links, ("/tmp", "/var/tmp")):
        path = root / link.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return root


async def _start_keeper(folder: Path, stdin: int = asyncio.subprocess.PIPE) -> asyncio.subprocess.Process:
    """A shell that waits for the end of its input, which comes when this process closes it or dies, then cleans up."""
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
    """Let the keeper do its work; where it is dead or stuck itself, another one does it."""
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
    """Words before a command that make it begin on two cores, where the machine has more.

    gVisor's kernel sets itself up for the cores that it sees, and keeps to that when it is moved to a single one. Set
    up for one, its threads often wait for a timer before they let each other go on, while the core has nothing to do:
    the slowest tenth of print calls took 34 ms and more, not 25. Set up for many, it has threads for each.
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
        if memory_folder():  # its parent is its own, so that nobody removes that while another worker is being made
            group = WorkerGroup(name, memory_mb + OVERHEAD_MB)
            (folder / "cgroups").write_text("\n".join(map(str, group.folders)))
        (folder / "config.json").write_text(json.dumps(make_spec(runtime, str(root), memory_mb)))
    except BaseException:
        if guard is None:  # there is nothing in it yet, and to start another keeper would fail as this one did
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
            # Its groups would be one more level in each hierarchy, and to enter them stops all forks of the machine.
            "--ignore-cgroups",
            *(() if os.geteuid() == 0 else ("--rootless",)),
            *("run", f"--bundle={folder}", name),
        ],
        group=group,
        tidy=lambda: _remove(folder, guard),
    )


async def sweep_stale() -> int:
    """Remove what dead owners left; returns the number of their workers. Those of live owners are not touched."""
    found = [folder for folder in base_folder().glob("retool-*") if owner_is_gone(folder.name.rpartition("-")[0])]
    for folder in found:
        await _remove(folder)
    for name in owners():  # groups whose folder is gone
        if owner_is_gone(name.rpartition("-")[0]):
            await remove_owner(name)
    return len(found)


def describe(isolation: dict[str, bool]) -> str:
    """One line for people."""
    build = probe()
    bounds = "memory bounded as a whole" if memory_folder() else "memory bounded per process only"
    return f"gvisor: runsc {build.version} on {build.platform}, own kernel, no network, host files hidden, {bounds}"
