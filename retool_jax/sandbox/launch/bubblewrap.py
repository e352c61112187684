"""The `bubblewrap` back-end: a worker has its own namespaces, and a filter of system calls holds its programs.

Programs see the runtime, read-only, no other file of the host, no network device, and no processes but their own. As
root each program has its own user id; without root each gets nested namespaces. A memory control group limits what a
worker uses in total, if this process may make one.
"""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from retool_jax.errors import UserError
from retool_jax.sandbox.launch import cgroup
from retool_jax.sandbox.launch.procfs import kill_stale_workers, owner_is_gone, owner_tag
from retool_jax.sandbox.launch.runtime import INSIDE_TARGET, Runtime, find_runtime
from retool_jax.sandbox.launch.worker import CAPABILITIES, INSIDE, Worker, start, supervisor_command
from retool_jax.sandbox.types import SandboxConfig

PROMISES = frozenset({"files", "network", "memory", "environment", "processes"})
COUNTS_CORES = False
INSTALL = "install bubblewrap: apt-get install bubblewrap (Fedora: dnf install bubblewrap)"
MACHINES = ("x86_64", "aarch64")
PROBE_S = 10.0
OVERHEAD_MB = 128  # what the supervisor and a program's own files take
TIERS_MB = 256  # what the fork servers take if all of them run
NAMESPACES = ("--unshare-net", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")


def namespaces(root: bool) -> list[str]:
    """Options that leave the host's namespaces; without root this needs a user namespace."""
    return [*NAMESPACES, *([] if root else ["--unshare-user"]), "--die-with-parent"]


@functools.cache
def _fault(root: bool) -> str:
    """Why bubblewrap cannot work here, and what to do; empty if it can."""
    if sys.platform != "linux":
        return f"it needs Linux, this is {sys.platform}; run in a Linux container"
    if os.uname().machine not in MACHINES:
        return f"its filter of system calls knows {' and '.join(MACHINES)}, this is {os.uname().machine}"
    path = shutil.which("bwrap")
    if path is None:
        return f"there is no bwrap; {INSTALL}"
    command = [path, *namespaces(root), "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{' '.join(command)} failed: {error}"
    if done.returncode == 0:
        return ""
    way_out = (
        "run the container with --privileged or with --security-opt seccomp=unconfined and SYS_ADMIN"
        if root
        else "allow unprivileged user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0, "
        "user.max_user_namespaces) or run as root"
    )
    return f"bwrap cannot make namespaces here ({done.stderr.strip()[-200:]}); {way_out}"


def missing(config: SandboxConfig) -> str:
    """Why this back-end cannot work here, and what to do; empty if it can."""
    if fault := _fault(os.geteuid() == 0):
        return fault
    try:
        find_runtime(config.image)
    except UserError as error:
        return str(error)
    return ""


def make_command(runtime: Runtime, root: bool, memory_mb: int, **setup: object) -> list[str]:
    """The command line of a worker; for `setup` see `worker.supervisor_command`."""
    command = [shutil.which("bwrap") or "bwrap", *namespaces(root), "--as-pid-1", "--hostname", "sandbox"]
    if root:
        command += ["--cap-drop", "ALL", *(word for name in CAPABILITIES for word in ("--cap-add", name))]
    if runtime.root is not None:
        command += ["--ro-bind", str(runtime.root), "/"]
    # bwrap would make folders on the way with the host's rights; an interpreter below /root would then be unreachable.
    above = sorted({str(parent) for path in runtime.binds for parent in Path(path).parents} - {"/"})
    command += [word for folder in above for word in ("--dir", folder)]
    for path in runtime.binds:
        command += ["--ro-bind", path, path]
    for target, link in runtime.links:
        command += ["--symlink", target, link]
    # Without root it belongs to the user whose programs these are, and what one leaves there the next would find.
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--ro-bind", str(INSIDE), INSIDE_TARGET]
    if runtime.root is None:
        command += ["--dir", "/tmp", "--dir", "/var", "--symlink", "/tmp", "/var/tmp", "--remount-ro", "/"]
    return command + supervisor_command(
        runtime.python,
        INSIDE_TARGET,
        packages=runtime.packages,
        python=runtime.version,
        seccomp=True,
        memory_mb=memory_mb,
        **setup,
    )


async def launch(config: SandboxConfig, memory_mb: int) -> Worker:
    """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""
    root = os.geteuid() == 0
    if fault := _fault(root):
        raise UserError(f"the bubblewrap sandbox: {fault}")
    runtime = find_runtime(config.image)
    if cgroup.memory_folder() is None:
        return await start(make_command(runtime, root, memory_mb))
    group = cgroup.WorkerGroup(owner_tag(), memory_mb + OVERHEAD_MB + TIERS_MB)
    # This descriptor tells the supervisor when the kernel kills a program because memory ran out.
    events = os.open(group.events, os.O_RDONLY)
    try:
        return await start(make_command(runtime, root, memory_mb, events=events), group=group, keep=(events,))
    finally:
        os.close(events)


def describe(isolation: dict[str, bool]) -> str:
    """One line for people about what the supervisor was granted."""
    users = "a uid per program" if isolation["own_uid"] else "nested namespaces per program"
    memory = "memory bounded as a whole" if isolation["memory_group"] else "memory bounded per process only"
    return f"bubblewrap: own namespaces, filtered system calls, no network, host files hidden, {users}, {memory}"


async def sweep_stale() -> int:
    """Kill the workers of dead owners and remove their memory groups; returns the number of both together."""
    found = await kill_stale_workers()
    for tag in cgroup.owners():
        if owner_is_gone(tag):
            await cgroup.remove_owner(tag)
            found += 1
    return found
