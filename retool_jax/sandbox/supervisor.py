"""The program inside a worker: forks one child per snippet, watches it, and answers over stdin and stdout.

Started as `python -I -S supervisor.py SCRATCH [PACKAGES ...]`, with nothing but the standard library, so that every
back-end can run this one file inside whatever it isolates with. A frame is a 4-byte big-endian length and that many
bytes of JSON; bytes inside it are base64. The first frame out says which isolation was granted; after that each
request gets one response. Anything on stdin during a call, above all its end, means that the caller has given up: the
supervisor kills what runs and leaves.

A fork costs what the process weighs, so this process stays lean: it has loaded what most snippets import and nothing
heavy; numpy and the like are imported by the snippets that want them, from PACKAGES.
"""

import ast
import atexit
import base64
import builtins
import contextlib
import ctypes
import gc
import json
import linecache
import os
import resource
import select
import signal
import site
import struct
import sys
import time
import traceback
import types
from typing import NamedTuple

PRELOADED = (
    *("bisect", "cmath", "collections", "decimal", "fractions", "functools", "heapq", "itertools", "math"),
    *("operator", "random", "re", "statistics", "string"),
)
SOURCE_NAME = "<snippet>"
MAX_FRAME_BYTES = 64 << 20
READ_BYTES = 65536
SWEEP_S = 2.0
SHARED_TEMPORARY = ("/var/tmp", "/dev/shm")
SIGNAL_NUMBERS = frozenset(signal.Signals)
READY, OUT_OF_MEMORY = b"r", b"m"  # what a child reports about itself
MESSAGE_HEADROOM_BYTES = 32 << 20  # memory beyond the limit, for the traceback of a MemoryError

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    *(0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000),
)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 4096, 16384, 1 << 18, 2


# ---------------------------------------------------------------------------------------------------------------------
# Isolation, once per worker
# ---------------------------------------------------------------------------------------------------------------------


def mount(source: str, target: str, kind: str, flags: int = 0, options: str = "") -> bool:
    return LIBC.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()) == 0


def unshare_all() -> int:
    """Leave as many of the host's namespaces as the kernel allows; returns the flags of those left."""
    wanted = (CLONE_NEWNET, CLONE_NEWPID, CLONE_NEWNS, CLONE_NEWIPC)
    if os.geteuid() == 0:
        return sum(flag for flag in wanted if LIBC.unshare(flag) == 0)
    uid, gid = os.geteuid(), os.getegid()
    if LIBC.unshare(CLONE_NEWUSER | sum(wanted)) != 0:  # without root, a user namespace is what grants the others
        return 0
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return CLONE_NEWUSER | sum(wanted)


def become_init() -> None:
    """Go on as process 1 of the new process namespace: when it dies, by whatever cause, the kernel kills the rest."""
    child = os.fork()
    if child:
        os.closerange(0, 256)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def open_to_others(path: str) -> bool:
    """Whether a user without rights can reach `path`."""
    while path != "/":
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def outermost(paths: list[str]) -> list[str]:
    """`paths` without duplicates and without those that lie inside another one."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def uncover(paths: list[str]) -> bool:
    """Let other users reach `paths` (an interpreter installed below /root, say) and nothing else there.

    In this mount namespace only, each closed folder on the way is replaced by an empty one that holds just `paths`.
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


class Isolation(NamedTuple):
    """What the kernel granted, and what the calls need to know of it."""

    first_uid: int | None  # programs run as this user or one of the `uid_count - 1` after it; None: as the caller's
    uid_count: int
    network: bool  # no network device, not even the host's loopback
    processes: bool  # a process namespace, with this process as its init
    files: bool  # a mount namespace: each call's working directory is a file system that vanishes with it
    nproc: bool  # a limit on processes counts this worker's alone
    work: str  # the working directory of the programs
    base_bytes: int  # address space of this process


def choose_uids() -> tuple[int, int]:
    """User ids that nothing else on the machine uses, so that limits and signals per user hit one worker alone."""
    salt = int.from_bytes(os.urandom(4), "big")
    first, count = (1 << 30) + (salt & 0x3FFFFF) * 256, 256
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(map(int, line.split())) for line in file]
    if any(start <= first and first + count <= start + length for start, _, length in ranges):
        return first, count
    return 20000 + salt % 40000, 1  # a container with 65536 ids


def isolate(scratch: str, packages: list[str]) -> Isolation:
    """Leave the host as far as the kernel allows. Exits with a message if no program could be run safely."""
    root = os.geteuid() == 0
    left = unshare_all()
    processes = bool(left & CLONE_NEWPID)
    if processes:
        become_init()
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)  # without a process namespace, orphans come here all the same
    files = bool(left & CLONE_NEWNS) and mount("none", "/", "none", MS_REC | MS_PRIVATE)
    prefixes = [sys.base_prefix, os.path.dirname(sys.executable), os.path.dirname(os.path.realpath(sys.executable))]
    needed = outermost([*prefixes, os.path.realpath(sys.base_prefix), *filter(os.path.exists, packages)])
    if root and not all(map(open_to_others, needed)) and not (files and uncover(needed)):
        sys.exit(f"an unprivileged user cannot read this Python ({sys.base_prefix}); install it outside closed folders")
    if files and processes:
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)  # hides what runs on the host
    work = "/tmp" if files and not any(path.startswith("/tmp/") for path in needed) else f"{scratch}/work"
    if files:
        os.makedirs(work, exist_ok=True)
    os.environ["HOME"] = os.environ["TMPDIR"] = work
    os.chmod(scratch, 0o711)
    release = [int(part) for part in os.uname().release.split("-")[0].split(".")[:2]]
    with open("/proc/self/statm") as file:
        base_bytes = int(file.read().split()[0]) * resource.getpagesize()
    first_uid, uid_count = choose_uids() if root else (None, 1)
    LIBC.prctl(PR_SET_DUMPABLE, 0)  # programs that share this user id must not trace it or read its memory
    return Isolation(
        first_uid=first_uid,
        uid_count=uid_count,
        network=bool(left & CLONE_NEWNET),
        processes=processes,
        files=files,
        nproc=root or (bool(left & CLONE_NEWUSER) and release >= [5, 14]),  # older kernels count all of a user's
        work=work,
        base_bytes=base_bytes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# The child: one program
# ---------------------------------------------------------------------------------------------------------------------


def confine(isolation: Isolation, call: int, limits: dict, stdin: int, stdout: int, stderr: int, report: int) -> int:
    """Turn the fresh fork into a process that may run a stranger's code; returns the descriptor for reports."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for target, source in enumerate((stdin, stdout, stderr, report)):
        os.dup2(source, target, inheritable=target != 3)
    os.closerange(4, 256)
    os.chdir(isolation.work)
    memory = isolation.base_bytes + (limits["memory_mb"] << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory + MESSAGE_HEADROOM_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_mb"] << 20,) * 2)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if isolation.nproc:
        resource.setrlimit(resource.RLIMIT_NPROC, (limits["processes"],) * 2)
    if isolation.first_uid is not None:
        uid = isolation.first_uid + call % isolation.uid_count
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    no_capabilities = struct.pack("<II6I", 0x20080522, 0, *[0] * 6)  # a user namespace hands out all of them
    if LIBC.capset(no_capabilities, no_capabilities[8:]) != 0 or LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot drop privileges")
    LIBC.prctl(PR_SET_DUMPABLE, 1)  # the change of user closed /proc/self to the program itself
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return 3


def execute(code: str, show_last_expression: bool, report: int) -> int:
    """Run `code` as `__main__`; returns the exit code."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    sys.path.insert(0, "")  # the empty working directory of this call alone
    site.setquit()  # -S left out exit(), quit() and help()
    site.sethelper()
    linecache.cache[SOURCE_NAME] = (len(code), None, code.splitlines(keepends=True), SOURCE_NAME)
    running = False
    try:
        tree = ast.parse(code.removeprefix("\ufeff"), SOURCE_NAME)
        last = tree.body.pop() if show_last_expression and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        parts = [compile(tree, SOURCE_NAME, "exec", dont_inherit=True)]
        if last is not None:  # what the interactive prompt does with a statement: show its value unless it is None
            parts.append(compile(ast.Interactive([last]), SOURCE_NAME, "single", dont_inherit=True))
        running = True
        for part in parts:
            exec(part, main.__dict__)
        return 0
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF
        print(stop.code, file=sys.__stderr__)
        return 1
    except BaseException as error:
        tell(error, running, report)
        return 1


def tell(error: BaseException, running: bool, report: int) -> None:
    """Write the traceback of the program's own frames; note a lack of memory."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)
        frames = error.__traceback__.tb_next if running and error.__traceback__ else None
        traceback.print_exception(type(error), error, frames, file=sys.__stderr__)
        if running and isinstance(error, MemoryError):  # the parser raises it too, for code nested too deeply
            os.write(report, OUT_OF_MEMORY)
    except BaseException:  # no memory even for that, or the program closed what is written to
        os.write(2, f"{type(error).__name__}\n".encode())


def run_child(request: dict, isolation: Isolation, call: int, *descriptors: int) -> None:
    """All of the child's life; never returns."""
    exit_code, ready = 1, False
    try:
        report = confine(isolation, call, request["limits"], *descriptors)
        # Whole lines go out at once, so that they survive a time-out. The streams are the interpreter's own, for
        # programs that look at sys.__stdout__.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
        gc.enable()
        sys.argv = [""]
        os.write(report, READY)
        ready = True
        exit_code = execute(request["code"], request["show_last_expression"], report)
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        if not ready:  # for the caller's log; later on it could only be noise about streams the program broke
            traceback.print_exc(file=sys.__stderr__)
    finally:
        for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            with contextlib.suppress(BaseException):  # the program may have closed or replaced it
                stream.flush()
        os._exit(exit_code)


# ---------------------------------------------------------------------------------------------------------------------
# The parent: one call
# ---------------------------------------------------------------------------------------------------------------------


class Capture:
    """Keeps the first and the last half of `limit` bytes of a stream, whatever its length."""

    def __init__(self, limit: int):
        self.half = limit // 2
        self.total = 0
        self.head = bytearray()
        self.tail = bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 4 * self.half:  # trimmed now and then: each trim copies what stays
            del self.tail[: -self.half]

    @property
    def truncated(self) -> bool:
        return self.total > 2 * self.half

    def kept(self) -> bytes:
        if not self.truncated:
            return bytes(self.head + self.tail)
        marker = b"\n[... %d bytes removed ...]\n" % (self.total - 2 * self.half)
        return bytes(self.head) + marker + bytes(self.tail[-self.half :])


def reap(pid: int) -> tuple[int, resource.struct_rusage] | None:
    """Collect every child that has ended; the wait status and usage of `pid` if it is among them."""
    found = None
    while True:
        try:
            ended, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended == pid:
            found = status, usage


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def descendants() -> list[int]:
    """Every process below this one; orphans count, for this process is their subreaper."""
    parents = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {os.getpid()})


def sweep(pid: int) -> tuple[tuple[int, resource.struct_rusage] | None, bool]:
    """Kill every process of the call. Returns what `reap` says of `pid`, and whether all are gone."""
    found, deadline, pause = None, time.monotonic() + SWEEP_S, 0.0002
    while has_children():
        if time.monotonic() > deadline:
            return found, False
        if os.getpid() == 1:
            os.kill(-1, signal.SIGKILL)  # in one go: nobody can fork away from it
        else:
            for victim in descendants():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
        found = reap(pid) or found
    return found, True


class Streams:
    """The two output streams of a call while it runs."""

    def __init__(self, descriptors: tuple[int, int], limits: dict):
        self.captures = {descriptor: Capture(limits["output_bytes"]) for descriptor in descriptors}
        self.open = set(descriptors)
        self.raw_limit = limits["raw_output_bytes"]

    def read(self, descriptor: int) -> bool:
        """Take what one stream holds, at most `READ_BYTES`; False if there was nothing."""
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.open.discard(descriptor)
        self.captures[descriptor].add(data)
        return bool(data)

    def drain(self) -> None:
        """Take all that is left once nobody writes any more."""
        for descriptor in tuple(self.open):
            while not self.over and self.read(descriptor):
                pass

    @property
    def over(self) -> bool:
        return sum(capture.total for capture in self.captures.values()) > self.raw_limit


class CallerGone(Exception):
    """Something came in, or the input ended, while a program was running."""


def watch(pid: int, streams: Streams, deadline: float, protocol_in: int, wakeup: int):
    """Wait for the end of process `pid`, its deadline or its output limit.

    Returns the verdict ("" if it ended by itself) and what `reap` says of it, None if it still runs.
    """
    poll = select.poll()
    for descriptor in (*streams.open, protocol_in, wakeup):
        poll.register(descriptor, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        for descriptor, _ in poll.poll(left * 1000):
            if descriptor == protocol_in:
                raise CallerGone
            if descriptor == wakeup:  # SIGCHLD: the main process ended, or an orphan did
                os.read(wakeup, READ_BYTES)
                if (ended := reap(pid)) is not None:
                    return "", ended
            else:
                streams.read(descriptor)
                if descriptor not in streams.open:
                    poll.unregister(descriptor)
        if streams.over:
            return "output_limit", None
    return "timeout", None


def judge(verdict: str, status: int, reports: bytes, limits: dict) -> tuple[str, str]:
    """The result's status and message."""
    if verdict == "timeout":
        return verdict, f"time limit of {limits['wall_s']:g} s reached"
    if verdict == "output_limit":
        return verdict, f"output limit of {limits['raw_output_bytes']} bytes exceeded"
    if READY not in reports:
        return "infra_error", "the program could not be confined"
    if OUT_OF_MEMORY in reports:
        return "oom", f"memory limit of {limits['memory_mb']} MB exceeded"
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return "user_error", f"killed by signal {signal.Signals(-code).name if -code in SIGNAL_NUMBERS else -code}"
    return ("user_error", f"exit code {code}") if code else ("success", "")


def open_stdin(data: bytes) -> int:
    if not data:
        return os.open("/dev/null", os.O_RDONLY)
    descriptor = os.memfd_create("stdin")  # not a pipe: nobody has to feed it
    os.write(descriptor, data)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def run_call(request: dict, isolation: Isolation, call: int, protocol_in: int, wakeup: int) -> dict:
    """Run one program to its end, whatever end that is; returns the response."""
    limits = request["limits"]
    stdin = open_stdin(base64.b64decode(request["stdin"]))
    (out, out_end), (err, err_end), (reports, reports_end) = os.pipe(), os.pipe(), os.pipe()
    ends = (stdin, out_end, err_end, reports_end)
    for descriptor in (out, err, reports):
        os.set_blocking(descriptor, False)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        run_child(request, isolation, call, *ends)
    for descriptor in ends:
        os.close(descriptor)
    streams = Streams((out, err), limits)
    verdict, ended = watch(pid, streams, started + limits["wall_s"], protocol_in, wakeup)
    wall_s = time.monotonic() - started
    swept, clean = sweep(pid)
    status, usage = ended or swept or (signal.SIGKILL, resource.getrusage(resource.RUSAGE_CHILDREN))
    streams.drain()
    if streams.over and not verdict:
        verdict = "output_limit"
    try:
        reported = os.read(reports, READ_BYTES)
    except BlockingIOError:
        reported = b""
    for descriptor in (out, err, reports):
        os.close(descriptor)
    result, message = judge(verdict, status, reported, limits)
    return_code = os.waitstatus_to_exitcode(status)
    return {
        "result": {
            "status": result,
            "message": message,
            "return_code": return_code,
            "signal": -return_code if return_code < 0 else None,
            "wall_s": wall_s,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
        },
        "streams": [
            {"data": base64.b64encode(c.kept()).decode(), "bytes": c.total, "truncated": c.truncated}
            for c in (streams.captures[out], streams.captures[err])
        ],
        "clean": clean,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Serving
# ---------------------------------------------------------------------------------------------------------------------


def read_exactly(descriptor: int, size: int) -> bytes:
    """`size` bytes; raises EOFError if the stream ends first."""
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def read_frame(descriptor: int) -> dict:
    (size,) = struct.unpack(">I", read_exactly(descriptor, 4))
    if size > MAX_FRAME_BYTES:
        raise EOFError
    return json.loads(read_exactly(descriptor, size))


def write_frame(descriptor: int, message: dict) -> None:
    payload = json.dumps(message).encode()
    data = memoryview(struct.pack(">I", len(payload)) + payload)
    while data:
        data = data[os.write(descriptor, data) :]


def open_work(isolation: Isolation, limits: dict, call: int) -> None:
    """An empty working directory for one call."""
    uid = None if isolation.first_uid is None else isolation.first_uid + call % isolation.uid_count
    if not isolation.files:
        os.mkdir(isolation.work, 0o700)
        if uid is not None:
            os.chown(isolation.work, uid, -1)
        return
    options = f"size={limits['file_mb']}m,nr_inodes=20000,mode=700,uid={os.geteuid() if uid is None else uid}"
    if not mount("tmpfs", isolation.work, "tmpfs", MS_NOSUID | MS_NODEV, options):
        raise OSError(ctypes.get_errno(), "cannot mount the working directory")
    for target in SHARED_TEMPORARY:  # other places where programs may leave files
        if os.path.isdir(target):
            mount(isolation.work, target, "none", MS_BIND)


def close_work(isolation: Isolation) -> None:
    if not isolation.files:
        # Not shutil.rmtree: a tree nested thousands deep, which a program can make, ends it with a RecursionError.
        os.waitpid(os.posix_spawn("/bin/rm", ["rm", "-rf", isolation.work], os.environ), 0)
        return
    for target in (*SHARED_TEMPORARY, isolation.work):
        LIBC.umount2(target.encode(), MNT_DETACH)  # at once, however many files there are


def main() -> None:
    scratch, packages = sys.argv[1], sys.argv[2:]
    # The protocol moves off 0 and 1, where a stray print or a program's input() could touch it.
    protocol_in, protocol_out = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    isolation = isolate(scratch, packages)
    sys.path += packages
    for name in PRELOADED:
        __import__(name)
    wakeup, wakeup_end = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(wakeup_end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
    gc.collect()
    gc.freeze()  # a collection in a child then leaves these pages alone, which saves copying them
    gc.disable()
    granted = {"own_uid": isolation.first_uid is not None}
    granted.update((name, getattr(isolation, name)) for name in ("network", "processes", "files"))
    write_frame(protocol_out, {"isolation": granted})
    call = 0
    try:
        while True:
            request = read_frame(protocol_in)
            call += 1
            open_work(isolation, request["limits"], call)
            try:
                response = run_call(request, isolation, call, protocol_in, wakeup)
            finally:
                close_work(isolation)
            write_frame(protocol_out, response)
            if not response["clean"]:
                break
    except (EOFError, CallerGone):
        pass
    finally:
        sweep(0)


if __name__ == "__main__":
    main()
