"""The host judges the attacks: what they must not reach, and the state of the machine before and after."""

import ctypes
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from retool_jax.sandbox.launch import cgroup
from retool_jax.sandbox.launch.procfs import owner_tag, stat_fields

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.shmat.restype = ctypes.c_void_p
IPC_RMID, PR_SET_CHILD_SUBREAPER = 0, 36
OPEN_FOLDERS = ("/srv", "/var/lib", "/var/tmp")  # for the canary: any user can read there


class Host:
    """Canary, secrets and listeners of the host. A context manager; `words` are put into the programs."""

    def __init__(self) -> None:
        self._exit = ExitStack()
        self.visits: list[str] = []
        """Connections to a listener."""

    def __enter__(self) -> "Host":
        head, tail = secrets.token_hex(8), secrets.token_hex(8)
        self.secret = f"{head}-{tail}"  # joined only on the host
        parent = next((path for path in OPEN_FOLDERS if os.access(path, os.W_OK)), tempfile.gettempdir())
        self.folder = Path(tempfile.mkdtemp(prefix="canary-", dir=parent))
        self._exit.callback(shutil.rmtree, self.folder)
        self.folder.chmod(0o755)
        self.canary = self.folder / f"canary-{secrets.token_hex(4)}.txt"
        self.canary.write_text(self.secret)
        self.canary.chmod(0o644)
        self.environment = {"ATTACK_SECRET": self.secret, "OPENAI_API_KEY": self.secret, "HF_TOKEN": self.secret}
        os.environ.update(self.environment)
        self._exit.callback(lambda: [os.environ.pop(name, None) for name in self.environment])
        self._shared = Path("/dev/shm") / f"attack-{secrets.token_hex(4)}"
        self._shared.write_text(self.secret)
        self._exit.callback(self._shared.unlink)
        key = secrets.randbelow(1 << 30) + 1
        segment = LIBC.shmget(key, 4096, 0o1666)  # IPC_CREAT
        self._exit.callback(LIBC.shmctl, segment, IPC_RMID, None)
        ctypes.memmove(LIBC.shmat(segment, None, 0), self.secret.encode(), len(self.secret))
        abstract = f"attack-{secrets.token_hex(4)}"
        ports = [self._listen(*words) for words in self._sockets(abstract)]
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # this process adopts orphans, and so sees them
        self._exit.callback(LIBC.prctl, PR_SET_CHILD_SUBREAPER, 0)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.free_port = free.getsockname()[1]
        self.words = {
            "CANARY_NAME": self.canary.name,
            "CANARY": str(self.canary),
            "FOLDER": str(self.folder),
            "SECRET_HEAD": head,
            "SECRET_TAIL": tail,
            "SHM_NAME": self._shared.name,
            "SHM_KEY": str(key),
            "ABSTRACT": abstract,
            "UNIX": str(self.folder / "socket"),
            "TCP": str(ports[0]),
            "UDP": str(ports[1]),
            "FREE": str(self.free_port),
            "ADDRESSES": repr(addresses()),
            "PID": str(os.getpid()),
            "MARKER": abstract,
        }
        self._others = descendants()
        self.before = self.state()
        return self

    def __exit__(self, *_) -> None:
        self._exit.close()

    def _sockets(self, abstract: str):
        yield socket.AF_INET, socket.SOCK_STREAM, ("0.0.0.0", 0)
        yield socket.AF_INET, socket.SOCK_DGRAM, ("0.0.0.0", 0)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            yield socket.AF_UNIX, kind, f"\0{abstract}" + ("" if kind == socket.SOCK_STREAM else str(int(kind)))
        yield socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "socket")

    def _listen(self, family: int, kind: int, name: str | tuple[str, int]) -> int:
        """Listen and note every connection; returns the port, or 0 if there is none."""
        server = self._exit.enter_context(socket.socket(family, kind))
        server.bind(name)
        if family == socket.AF_UNIX and not str(name).startswith("\0"):
            os.chmod(name, 0o777)
        server.settimeout(0.2)
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                with suppress(TimeoutError):
                    visitor = server.recv(100) if kind == socket.SOCK_DGRAM else server.accept()[0]
                    self.visits.append(f"{socket.AddressFamily(family).name} {socket.SocketKind(kind).name}")
                    if isinstance(visitor, socket.socket):
                        with visitor, suppress(OSError):  # it may have closed already
                            visitor.send(self.secret.encode())

        if kind != socket.SOCK_DGRAM:
            server.listen()
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        self._exit.callback(thread.join)
        self._exit.callback(stopped.set)
        return server.getsockname()[1] if family == socket.AF_INET else 0

    def state(self) -> dict[str, object]:
        """The state that no program may change."""
        core = Path("/proc/sys/kernel/core_pattern")
        return {
            "canary": (self.canary.read_text(), oct(self.canary.stat().st_mode), self.canary.stat().st_uid),
            "canary's folder": sorted(path.name for path in self.folder.iterdir()),
            "host's name": os.uname().nodename,
            "clock": round((time.time() - time.monotonic()) / 5),
            "core pattern": core.read_text() if core.exists() else "",
            "mounts": mounts_of_nobody_else(),
        }

    def own(self) -> dict[int, str]:
        """Live descendants of this process that are newer than this object: start time by pid."""
        return {pid: start for pid, start in descendants().items() if self._others.get(pid) != start}

    def complaints(self) -> list[str]:
        """Changes of the state, and connections, since the last check."""
        now, wrong = self.state(), []
        for name, value in self.before.items():
            if name == "clock" and abs(now[name] - value) <= 1:
                continue
            if now[name] != value:
                wrong.append(f"the host's {name} went from {value} to {now[name]}")
        self.before = now
        wrong += [f"a listener of the host was reached: {visit}" for visit in self.visits]
        self.visits.clear()
        return wrong

    # While a program runs

    def most_processes(self, running: Callable[[], bool]) -> int:
        """The largest growth of the number of this process's descendants."""
        first = most = len(self.own())
        while running():
            most = max(most, len(self.own()))
            time.sleep(0.05)
        return most - first

    def most_memory_mb(self, running: Callable[[], bool]) -> float:
        """The largest growth of the memory of this process's workers, MiB."""
        first = most = self.memory_mb()
        while running():
            most = max(most, self.memory_mb())
            time.sleep(0.02)
        return most - first

    def memory_mb(self) -> float:
        """Memory charged to the workers' control groups, files in memory included, and memory of descendants outside
        these groups; MiB."""
        charged, members = 0, set()
        if (where := cgroup.memory_folder()) is not None:
            for group in where.path.glob(f"{owner_tag()}*/*/"):
                with suppress(OSError):
                    name = "memory.current" if where.unified else "memory.usage_in_bytes"
                    charged += int((group / name).read_text())
                    members |= set(map(int, (group / "cgroup.procs").read_text().split()))
        return charged / (1 << 20) + sum(share_mb(pid) for pid in self.own() if pid not in members)

    def reaches_port_of_program(self, running: Callable[[], bool]) -> str:
        """Try to connect to the port that the program listens on."""
        while running():
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.free_port), 0.2):
                return "the program's port is open on the host"
            time.sleep(0.1)
        return ""


def mounts_of_nobody_else() -> list[str]:
    """All mount points except those of other owners' workers and of other tests."""
    elsewhere = re.compile(rf"/retool-(?!{os.getpid()}-)|/pytest-of-")
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [mount for mount in mounts if not elsewhere.search(mount)]


def addresses() -> list[str]:
    """This machine's addresses without the loopback."""
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    except OSError:
        found = set()
    return sorted(address for address in found if not address.startswith("127."))


# Processes, as the host sees them


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third one, the state, on; empty if the process is gone."""
    try:
        return stat_fields(pid)
    except OSError:
        return []


def descendants(root: int | None = None) -> dict[int, str]:
    """Live descendants of `root` (default: this process) without zombies: start time by pid."""
    stats = {int(name): _stat(int(name)) for name in os.listdir("/proc") if name.isdecimal()}
    below, found = {root or os.getpid()}, set()
    while below:
        below = {pid for pid, words in stats.items() if words and int(words[1]) in below} - found
        found |= below
    return {pid: stats[pid][19] for pid in found if stats[pid][0] != "Z"}


def share_mb(pid: int) -> float:
    """Memory of a process, MiB; a page that n processes share counts 1/n. 0 if the process is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def command(pid: int) -> str:
    """The command line of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def alive(processes: dict[int, str], patience_s: float = 30.0) -> dict[int, str]:
    """Those of `processes` (start time by pid) that live after `patience_s`, with their command lines."""
    deadline = time.monotonic() + patience_s
    while True:
        left = {
            pid for pid, start in processes.items() if (words := _stat(pid)) and words[19] == start and words[0] != "Z"
        }
        if not left or time.monotonic() > deadline:
            return {pid: command(pid) for pid in left}
        time.sleep(0.02)


def remains(tag: str, patience_s: float = 10.0) -> list[str]:
    """Mounts, control groups, files and sockets whose name contains `tag` and that are there after `patience_s`."""
    deadline = time.monotonic() + patience_s  # another sandbox on this machine may be removing them
    while (found := _named(tag)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return found


def _named(tag: str) -> list[str]:
    found = [
        f"mount {line.split()[4]}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if tag in line.split()[4] or tag in line.split()[3]
    ]
    for top, depth in (
        ("/sys/fs/cgroup", 6),
        ("/tmp", 2),
        ("/run", 3),
        ("/var/run", 3),
        ("/dev/shm", 1),
        ("/var/tmp", 2),
    ):
        if Path(top).is_symlink():
            continue
        done = subprocess.run(
            ["find", top, "-maxdepth", str(depth), "-name", f"*{tag}*"], capture_output=True, text=True, check=False
        )
        found += done.stdout.split()
    return found


# A separate owner, which can be killed

OWNER = """
import asyncio, signal, sys
from retool_jax.sandbox import Limits, SandboxConfig, open_sandbox

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored

async def main():
    async with open_sandbox(SandboxConfig(backend=(sys.argv[1],), slots=1)) as box:
        await box.run("print(1)")
        print("ready", flush=True)
        print((await box.run(sys.argv[2], limits=Limits(wall_s=float(sys.argv[3])))).status, flush=True)

asyncio.run(main())
"""


def start_owner(backend: str, code: str, wall_s: float = 60.0) -> subprocess.Popen:
    """Start another process with its own sandbox, which runs `code`; returns when the program runs."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, backend, code, str(wall_s)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert owner.stdout is not None
    if owner.stdout.readline() != "ready\n":
        owner.kill()
        raise OSError(f"the owner did not start: {owner.wait()}")
    time.sleep(0.5)
    return owner
