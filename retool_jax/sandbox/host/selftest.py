"""Tests a back-end's promises on this machine before anything else runs in it."""

import asyncio
import json
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from retool_jax.errors import UserError
from retool_jax.sandbox.launch.worker import ENVIRONMENT
from retool_jax.sandbox.types import Limits, SandboxConfig, ToolResult

WALL_S = 20.0
MEMORY_MB = 64
# Folders of the host that programs must not see. Some back-ends mount their own folders over the temporary ones.
CANARY_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run", "~", ".")

# Looks for everything that the host has prepared and prints what it found.
_PROGRAM = """
import json, os, socket
given = json.loads({given!r})
if os.environ.get("PWD") in ("/", os.getcwd()):  # set by a launcher, so it tells nothing about the host
    del os.environ["PWD"]
found = {{"sum": 2 + 2, "environment": sorted(os.environ), "files": [], "network": [], "processes": []}}
for path in given["canaries"]:
    for root in ("", "/proc/1/root", "/proc/%d/root" % given["pid"]):
        try:
            found["files"].append(open(root + path).read())
        except OSError:
            pass
        try:
            open(os.path.dirname(root + path) + "/written", "w").close()
        except OSError:
            pass
for family, address in ((socket.AF_INET, ("127.0.0.1", given["port"])), (socket.AF_UNIX, given["socket"])):
    try:
        with socket.socket(family, socket.SOCK_STREAM) as client:
            client.settimeout(1)
            client.connect(address if family == socket.AF_INET else "\\0" + address)
            found["network"].append(str(address))
    except OSError:
        pass
for name in filter(str.isdecimal, os.listdir("/proc")):
    try:
        found["processes"].append(open("/proc/" + name + "/cmdline", errors="replace").read())
    except OSError:
        pass
print(json.dumps(found))
"""
_BOMB = f"x = bytearray({2 * MEMORY_MB} << 20)\nprint(len(x))"


@contextmanager
def _canaries(secret: str) -> Iterator[list[Path]]:
    """Files with the secret that everybody can read, one in each of the usual places."""
    folders = []
    try:
        for parent in dict.fromkeys(Path(name).expanduser().absolute() for name in CANARY_FOLDERS):
            with suppress(OSError):
                folder = Path(tempfile.mkdtemp(prefix=f".canary-{os.getpid()}-", dir=parent))
                folders.append(folder)
                folder.chmod(0o777)
                (folder / "secret").write_text(secret)
        yield [folder / "secret" for folder in folders]
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _listener(family: socket.AddressFamily, address: tuple[str, int] | str) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.bind(address)
        server.listen()
        server.setblocking(False)
        yield server


def _was_reached(server: socket.socket) -> bool:
    try:
        server.accept()[0].close()
    except BlockingIOError:
        return False
    return True


class Subject(Protocol):
    """The part of a sandbox that the self-test needs."""

    config: SandboxConfig

    async def run(self, code: str, *, limits: Limits, allowed_modules: Sequence[str]) -> ToolResult:
        """Run a program."""


async def check_promises(box: Subject, promises: Set[str]) -> None:
    """Test each of the back-end's promises from inside, and judge by what the host sees.

    Raises UserError for the first promise that does not hold, and if no program runs.
    """
    secret = secrets.token_hex(16)
    with ExitStack() as stack:
        canaries = stack.enter_context(_canaries(secret))
        listener = stack.enter_context(_listener(socket.AF_INET, ("127.0.0.1", 0)))
        abstract = stack.enter_context(_listener(socket.AF_UNIX, f"\0{secret}"))
        # It ends with its input, so it cannot outlive this process.
        marker = await asyncio.create_subprocess_exec(
            "/bin/sh", "-c", "read line", f"marker-{secret}", stdin=asyncio.subprocess.PIPE
        )
        assert marker.stdin is not None
        try:
            given = {"canaries": list(map(str, canaries)), "pid": os.getpid(), "socket": secret}
            given["port"] = listener.getsockname()[1]
            limits = replace(box.config.limits, wall_s=WALL_S, output_bytes=1 << 20, raw_output_bytes=8 << 20)
            result = await box.run(_PROGRAM.format(given=json.dumps(given)), limits=limits, allowed_modules=())
        finally:
            marker.stdin.close()
            await marker.wait()
        if result.status != "success":
            details = " ".join(filter(None, (result.message, result.stderr[-300:].strip())))
            raise UserError(f"self-test: a program ended as {result.status}: {details}")
        found = json.loads(result.stdout)
        broken = {
            "environment": found["environment"] != sorted(ENVIRONMENT) and f"it sees {found['environment']}",
            "files": any(secret in text for text in found["files"]) and "it read a file of the host",
            "network": (_was_reached(listener) or _was_reached(abstract)) and "it reached a socket of the host",
            "processes": any(secret in line for line in found["processes"]) and "it sees processes of the host",
        }
        touched = any((path.parent / "written").exists() or path.read_text() != secret for path in canaries)
        broken["files"] = broken["files"] or (touched and "it wrote to a folder of the host")
    bomb = await box.run(_BOMB, limits=replace(limits, memory_mb=MEMORY_MB), allowed_modules=())
    broken["memory"] = bomb.status != "oom" and f"with {MEMORY_MB} MB it took twice that and ended as {bomb.status}"
    if found["sum"] != 4:
        raise UserError(f"self-test: 2 + 2 is {found['sum']}")
    for promise in sorted(promises):
        if reason := broken[promise]:
            raise UserError(f"self-test: this back-end promises {promise!r} and does not hold it here: {reason}")
