"""The isolation that the supervisor sets up once per worker: namespaces, mounts, user ids, capabilities."""

import ctypes
import os
import signal
import struct
import sys
from typing import NamedTuple

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER = 0x00020000, 0x08000000, 0x10000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_GET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 2, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 36, 38
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2
CAPABILITIES_VERSION = 0x20080522
LAST_CAPABILITY = 63
NO_CAPABILITIES = struct.pack("<II6I", CAPABILITIES_VERSION, 0, *[0] * 6)


class Isolation(NamedTuple):
    """What the kernel granted, as far as calls need to know it."""

    first_uid: int | None  # programs run as this user or one of the `uid_count - 1` after it; None: as the caller
    uid_count: int
    nested: bool  # no user ids available: each program gets its own user, process and mount namespaces
    network: bool  # there is no network device, not even the host's loopback
    processes: bool  # only this worker runs in its process namespace
    files: bool  # each call's working directory is a file system that is unmounted after it
    nproc: bool  # the limit on processes counts only those of this worker
    seccomp: bool  # programs run under a filter of system calls
    ipc: bool  # each program must leave the IPC namespace (not needed under the filter, which refuses its calls)
    immune: bool  # this is process 1 of Linux, which ignores signals of the programs
    work: str  # the working directory of the programs
    dies_with_parent: bool  # the kernel kills this worker when its parent dies

    def uid(self, call: int) -> int | None:
        """The user id for the programs of call number `call`; None: that of this process."""
        return None if self.first_uid is None else self.first_uid + call % self.uid_count


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> bool:
    return LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) == 0


def mount_proc() -> bool:
    return mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def enter_user_namespace(flags: int) -> bool:
    """Leave the user namespace and those in `flags`; in the new one this process has every capability."""
    uid, gid = os.geteuid(), os.getegid()
    if LIBC.unshare(CLONE_NEWUSER | flags) != 0:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def unshare_all(wanted: tuple[int, ...]) -> int:
    """Leave as many of the namespaces as the kernel allows; returns the flags of those that were left."""
    if os.geteuid() == 0:
        return sum(flag for flag in wanted if LIBC.unshare(flag) == 0)
    return CLONE_NEWUSER | sum(wanted) if enter_user_namespace(sum(wanted)) else 0


def become_init() -> None:
    """Continue as process 1 of the new process namespace: if it dies, the kernel kills all others in it."""
    child = os.fork()
    if child:
        os.closerange(0, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def drop_capabilities() -> None:
    """Give up every capability of this process. Raises OSError if that fails."""
    if LIBC.capset(NO_CAPABILITIES, NO_CAPABILITIES[8:]) != 0:
        raise OSError(ctypes.get_errno(), "cannot drop privileges")


def close_bounding_set() -> None:
    """Make sure that programs never get a capability, from a file or by inheritance; this process keeps its own."""
    for capability in range(LAST_CAPABILITY + 1):
        LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = struct.pack("<II", CAPABILITIES_VERSION, 0)
    data = ctypes.create_string_buffer(24)
    if LIBC.capget(header, data) == 0:
        low_e, low_p, _, high_e, high_p, _ = struct.unpack("<6I", data.raw[:24])
        LIBC.capset(header, struct.pack("<6I", low_e, low_p, 0, high_e, high_p, 0))


def open_to_others(path: str) -> bool:
    """Whether a user without special rights can reach `path`."""
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def outermost(paths: list[str]) -> list[str]:
    """`paths` without duplicates and without those inside another one."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def uncover(paths: list[str]) -> bool:
    """Let other users reach `paths` (for example an interpreter below /root) but nothing else there.

    In this mount namespace only, each closed folder on the way is replaced by an empty one that holds only `paths`.
    """
    handles = {path: os.open(path, os.O_PATH) for path in paths}
    try:
        for path in paths:
            while not open_to_others(path):
                closed = path
                while not open_to_others(os.path.dirname(closed)):
                    closed = os.path.dirname(closed)
                if closed == path or not mount("tmpfs", closed, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755"):
                    return False
                for inner in (inner for inner in paths if inner.startswith(closed + "/")):
                    os.makedirs(inner, exist_ok=True)
                    if not mount(f"/proc/self/fd/{handles[inner]}", inner, "none", MS_BIND | MS_REC):
                        return False
        return True
    finally:
        for handle in handles.values():
            os.close(handle)


def choose_uids() -> tuple[int, int]:
    """(first, count) of user ids that nothing else uses, so that limits and signals per user hit only one worker."""
    salt = int.from_bytes(os.urandom(4), "big")
    first, count = (1 << 30) + (salt & 0x3FFFFF) * 256, 256
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    if any(start <= first and first + count <= start + length for start, _, length in ranges):
        return first, count
    return 20000 + salt % 40000, 1  # for a container with 65536 ids


def open_scratch(scratch: str, packages: list[str], files: bool, processes: bool) -> str:
    """Let programs use the worker's own folder and reach this Python; returns their working directory.

    `files` and `processes` are as in `Isolation`. Exits with a message if programs cannot read this Python.
    """
    prefixes = [sys.base_prefix, os.path.dirname(sys.executable), os.path.dirname(os.path.realpath(sys.executable))]
    needed = outermost([*prefixes, os.path.realpath(sys.base_prefix), *filter(os.path.exists, packages)])
    if os.geteuid() == 0 and not all(map(open_to_others, needed)) and not (files and uncover(needed)):
        sys.exit(f"an unprivileged user cannot read this Python ({sys.base_prefix}); install it outside closed folders")
    if files and processes:
        mount_proc()  # hides the host's processes
    work = "/tmp"
    if not files or any(path.startswith("/tmp/") for path in needed):
        work = f"{scratch}/work"
    if files:
        os.makedirs(work, exist_ok=True)
    os.chmod(scratch, 0o711)
    return work


def isolate(setup: dict) -> Isolation:
    """Isolate this process as far as the launcher asks and the kernel allows; see `supervisor.py` for `setup`.

    Exits with a message if no program could run safely.
    """
    root = os.geteuid() == 0
    if setup.get("unshare"):
        left = unshare_all((CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWNS, CLONE_NEWIPC))
        network, processes = bool(left & CLONE_NEWNET), bool(left & CLONE_NEWPID)
        if processes:
            become_init()
    elif not __file__.startswith("/inside/"):  # where launchers put this folder; elsewhere a mount would be the host's
        sys.exit("this is no sandbox: without `unshare` in SETUP, this program must run inside one")
    else:  # the launcher has done it; without root, mounting still needs a user namespace
        left = CLONE_NEWNS if root else unshare_all((CLONE_NEWNS,))
        network = processes = True
    files = bool(left & CLONE_NEWNS)
    if files and (setup.get("unshare") or not root):
        files = mount("none", "/", "none", MS_REC | MS_PRIVATE)
    work = "/tmp"
    if scratch := setup.get("scratch"):
        work = open_scratch(scratch, setup.get("packages", []), files, processes)
    elif not files:
        sys.exit("the sandbox cannot mount a working directory: it needs root or user namespaces")
    os.environ["HOME"] = os.environ["TMPDIR"] = work
    for name in ("PWD", "OLDPWD"):  # set by the launcher's shell
        os.environ.pop(name, None)
    release = [int(part) for part in os.uname().release.split("-")[0].split(".")[:2]]
    nested = bool(left & CLONE_NEWUSER)
    first_uid, uid_count = choose_uids() if root else (None, 1)
    dies = ctypes.c_int()
    LIBC.prctl(PR_GET_PDEATHSIG, ctypes.byref(dies), 0, 0, 0)
    if root:
        close_bounding_set()
        os.setgroups([])
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # this process adopts the orphans of a fork server that died
    LIBC.prctl(PR_SET_DUMPABLE, 0)  # programs with the same user id must not trace this process or read its memory
    return Isolation(
        first_uid=first_uid,
        uid_count=uid_count,
        nested=nested,
        network=network,
        processes=processes,
        files=files,
        nproc=root or (nested and release >= [5, 14]),  # older kernels count all processes of a user
        seccomp=bool(setup.get("seccomp")),
        ipc=root and not setup.get("seccomp"),
        immune=os.getpid() == 1 and bool(setup.get("unshare") or setup.get("seccomp")),
        work=work,
        dies_with_parent=dies.value != 0,
    )
