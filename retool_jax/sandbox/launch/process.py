"""The `process` back-end: a worker is an ordinary child process.

A program is isolated only by resource limits and by what the kernel grants the supervisor: a separate user id, and
network, process and mount namespaces. Programs can read all files of the host that other users can read. So this
back-end is for your own machine, and it is never chosen unless the configuration names it.
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
REMOVE_S = 5.0


def missing(config: SandboxConfig) -> str:
    """Why this back-end cannot work here; empty if it can."""
    return "" if sys.platform == "linux" else f"it needs Linux, this is {sys.platform}; run in a Linux container"


async def _remove(folder: Path) -> None:
    """Remove a folder with `rm -rf`: programs can nest folders too deep for `shutil.rmtree`."""
    process = await asyncio.create_subprocess_exec(
        *("rm", "-rf", str(folder)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await asyncio.wait_for(process.wait(), REMOVE_S)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await asyncio.wait_for(process.wait(), REMOVE_S)


async def launch(config: SandboxConfig, memory_mb: int) -> Worker:
    """Start a worker for programs of up to `memory_mb`. Raises UserError or OSError."""
    if reason := missing(config):
        raise UserError(f"the process sandbox: {reason}")
    scratch = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{owner_tag()}-"))

    async def tidy() -> None:
        try:
            scratch.rmdir()
        except OSError:  # not empty: the worker was killed before it could tidy up
            await _remove(scratch)

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
    """One line for people about what the supervisor was granted."""
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
    """Kill the workers of dead owners and remove their folders; returns the number of both together."""
    found = await kill_stale_workers()
    for folder in Path(tempfile.gettempdir()).glob(f"{SCRATCH_PREFIX}retool-*"):
        tag = folder.name.removeprefix(SCRATCH_PREFIX).rpartition("-")[0]
        if owner_is_gone(tag) and folder.lstat().st_uid == os.geteuid():
            await _remove(folder)
            found += 1
    return found
