"""The `process` back-end: a worker is an ordinary child process.

What keeps a program apart is resource limits and whatever the kernel grants the supervisor on the spot: a user id of
its own, and network, process and mount namespaces. The host's files stay readable to the extent that other users can
read them, so this back-end is for one's own machine and is never chosen unless the configuration names it.
"""

import asyncio
import os
import sys
import sysconfig
import tempfile
from contextlib import suppress
from pathlib import Path

from retool_jax.errors import UserError
from retool_jax.sandbox.launch.procfs import kill_stale_workers, owner_is_gone, owner_tag
from retool_jax.sandbox.launch.worker import INSIDE, Worker, start, supervisor_command
from retool_jax.sandbox.types import SandboxConfig

PROMISES = frozenset({"memory", "environment"})
COUNTS_CORES = False
SCRATCH_PREFIX = "sandbox-"


def missing(config: SandboxConfig) -> str:
    """Why this back-end cannot work here; empty if it can."""
    return "" if sys.platform == "linux" else f"it needs Linux, this is {sys.platform}; run in a Linux container"


async def finish(*command: str, timeout_s: float = 5.0) -> int | None:
    """Run an external command without output; its exit code, or None if it had to be killed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        return await asyncio.wait_for(process.wait(), timeout_s)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.wait_for(process.wait(), timeout_s)
        return None


async def launch(config: SandboxConfig, memory_mb: int) -> Worker:
    """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""
    if reason := missing(config):
        raise UserError(f"the process sandbox: {reason}")
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{owner_tag()}-"))

    async def tidy() -> None:
        try:
            scratch.rmdir()
        except OSError:  # not empty: a killed worker could not tidy up; what programs nested is too deep for shutil
            await finish("rm", "-rf", str(scratch))

    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    command = supervisor_command(
        sys.executable,
        str(INSIDE),
        packages=list(packages),
        unshare=True,
        scratch=str(scratch),
        memory_mb=memory_mb,
    )
    return await start(command, tidy=tidy)


def describe(isolation: dict[str, bool]) -> str:
    """One line for people: what the supervisor said it was granted."""
    granted = {
        "own_uid": "own uid",
        "network": "no network",
        "processes": "own process tree",
        "files": "own temporary files",
    }
    have = [words for key, words in granted.items() if isolation[key]]
    lack = [words for key, words in granted.items() if not isolation[key]]
    missing = f"; not granted here: {', '.join(lack)}" if lack else ""
    return f"process: {', '.join(['rlimits', *have])} (unsafe: host files are readable{missing})"


async def sweep_stale() -> int:
    """Kill the workers of dead owners and remove their folders; returns how many of both."""
    found = await kill_stale_workers()
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}retool-*"):
        tag = folder.name.removeprefix(SCRATCH_PREFIX).rpartition("-")[0]
        if owner_is_gone(tag) and folder.lstat().st_uid == os.geteuid():
            await finish("rm", "-rf", str(folder))
            found += 1
    return found
