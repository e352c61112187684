"""The `process` back-end: a worker is an ordinary child process.

What keeps a program apart is resource limits and whatever the kernel grants the supervisor on the spot: a user id of
its own, and network, process and mount namespaces. The host's files stay readable to the extent that other users can
read them, so this back-end is for one's own machine and is never chosen unless the configuration names it.
"""

import asyncio
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from retool_jax.errors import UserError

SUPERVISOR = Path(__file__).with_name("supervisor.py")
STOP_GRACE_S = 1.0
STREAM_BUFFER_BYTES = 1 << 20

# Built from nothing, so that no token or key of the host's environment can be read by a program. One thread per maths
# library: a slot stands for one core.
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "HOME": "/tmp",
    "TMPDIR": "/tmp",
    "LANG": "C.UTF-8",
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
}


@dataclass(frozen=True)
class Worker:
    """A running supervisor: frames go in at `writer` and come out at `reader`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    process: asyncio.subprocess.Process
    scratch: Path

    async def last_words(self) -> str:
        """The end of what a dead worker wrote to stderr, on one line."""
        assert self.process.stderr is not None
        try:
            text = await asyncio.wait_for(self.process.stderr.read(65536), STOP_GRACE_S)
        except TimeoutError:
            return ""
        return " | ".join(text.decode(errors="replace").split("\n")[-4:]).strip(" |")

    async def stop(self) -> None:
        """End the worker and everything that runs in it; safe to call on a dead one."""
        self.writer.close()  # end of file tells the supervisor to kill its programs and leave
        try:
            await asyncio.wait_for(self.process.wait(), STOP_GRACE_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
        try:
            self.scratch.rmdir()
        except (
            OSError
        ):  # not empty: a killed worker could not tidy up; what programs nested there is too deep for shutil
            await (await asyncio.create_subprocess_exec("rm", "-rf", str(self.scratch))).wait()


async def launch() -> Worker:
    """Start a worker. Raises OSError if the process cannot be started."""
    if sys.platform != "linux":
        raise UserError(f"the process sandbox needs Linux, this is {sys.platform}; run in a Linux container")
    scratch = Path(tempfile.mkdtemp(prefix="retool-sandbox-"))
    # -S keeps `site` and its .pth files (some run code, 20 ms and more) out of the start; the packages' own folders
    # are handed over instead.
    packages = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(SUPERVISOR), str(scratch), *packages),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=ENVIRONMENT,
            cwd="/",
            start_new_session=True,  # Ctrl-C in a terminal is for the trainer, which closes the sandbox in order
            limit=STREAM_BUFFER_BYTES,
        )
    except BaseException:
        scratch.rmdir()
        raise
    assert process.stdin is not None and process.stdout is not None
    return Worker(process.stdout, process.stdin, process, scratch)


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
