"""One program, from its fork to its end."""

import ast
import atexit
import builtins
import contextlib
import ctypes
import gc
import io
import linecache
import marshal
import os
import resource
import signal
import site
import socket
import sys
import time
import traceback

import seccomp
from isolation import (
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    LIBC,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    Isolation,
    drop_capabilities,
    enter_user_namespace,
    mount_proc,
)
from main_module import Main
from streams import Output, replace_streams
from wire import receive_packet, unpack

INSIDE = os.path.dirname(os.path.abspath(__file__))
OWN_MODULES = tuple(name.removesuffix(".py") for name in os.listdir(INSIDE) if name.endswith(".py"))
REPORT = 3  # descriptor on which a child reports about itself
MESSAGE_HEADROOM_BYTES = 32 << 20  # memory beyond the limit, for the traceback of a MemoryError
OPEN_FILES = 128
WARM_UP_RUNS = 40


def report(text: str) -> None:
    """Send the supervisor a message: a word, and numbers for some words."""
    with contextlib.suppress(OSError):  # the program may have closed it
        os.write(REPORT, text.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Confinement
# ---------------------------------------------------------------------------------------------------------------------

# After a fork each page that is written to is copied, and running a function writes to the pages that hold it. So all
# that can be done before the fork is done in `prepare`, and the rest calls few functions.


def prepare() -> tuple[dict, tuple[Output, Output]]:
    """Set up what is the same for every program, once per fork server.

    Returns the namespace of the future `__main__`, and the buffers of stdout and stderr.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    if LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "cannot forbid new privileges")
    outputs = replace_streams()
    # Children that are ended while they run `__main__` leave semaphores behind; no program's output must mention that.
    sys.warnoptions.append("ignore:resource_tracker")
    site.setquit()  # the option -S left out exit(), quit() and help()
    site.sethelper()
    site.setcopyright()
    # A slot stands for one core. Pools of processes have as many members as there are cores, and on a machine with many
    # these would be more processes and descriptors than a program may have.
    for name in ("cpu_count", "process_cpu_count"):
        if hasattr(os, name):
            setattr(os, name, lambda: 1)
    sys.argv = [""]
    sys.path.insert(0, "")  # the working directory, which belongs to one call alone
    for name in OWN_MODULES:
        sys.modules.pop(name, None)
    for _ in range(WARM_UP_RUNS):  # the interpreter rewrites a function during its first calls
        execute("x = 1\nx + 1 and None", "<snippet>", True, {"__builtins__": builtins})
        LIBC.prctl(PR_SET_DUMPABLE, 0)
        print(1)
    linecache.cache.clear()
    main = Main("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return main.__dict__, outputs


def confine(isolation: Isolation, request: dict, base_bytes: int) -> None:
    """Take all rights from the new fork that untrusted code must not have. Raises OSError if that fails."""
    os.setsid()
    os.chdir(isolation.work)
    limits, uid = request["limits"], request["uid"]
    if request["oom_first"]:  # if the worker's memory runs out, the kernel kills this process, not the fork server
        with contextlib.suppress(OSError):
            score = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            os.write(score, b"500")
            os.close(score)
    if isolation.ipc:
        LIBC.unshare(CLONE_NEWIPC)
    ceiling = request["memory_mb"] if request["session"] else limits["memory_mb"]
    memory = base_bytes + (limits["memory_mb"] << 20)
    setrlimit = resource.setrlimit
    setrlimit(resource.RLIMIT_AS, (memory, base_bytes + (ceiling << 20) + MESSAGE_HEADROOM_BYTES))
    setrlimit(resource.RLIMIT_FSIZE, (limits["file_mb"] << 20, limits["file_mb"] << 20))
    if isolation.nproc:
        setrlimit(resource.RLIMIT_NPROC, (limits["processes"], limits["processes"]))
    if uid is None:
        drop_capabilities()
    else:  # a change from root to another user drops all capabilities; the bounding set is empty already
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    LIBC.prctl(PR_SET_DUMPABLE, 1)  # the change of user closed /proc/self to the program itself
    if not isolation.processes:  # otherwise the namespace ends with its first process
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def fork_nested(outcome: int) -> int | None:
    """Fork a program into its own user, process and mount namespaces, below an init that waits for it.

    If no user ids are available, this protects other processes of the same user from the program: it cannot name them.
    The program is not the init itself, because such a process ignores its own fatal signals. Returns None in the
    program, and the pid to wait for in the caller. The init writes the wait status and usage to `outcome`.
    """
    if outer := os.fork():
        return outer
    LIBC.prctl(PR_SET_DUMPABLE, 1)  # otherwise the maps of the new user namespace are not writable
    if not enter_user_namespace(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC):
        os._exit(1)
    if init := os.fork():
        os.closerange(0, 256)
        os.waitpid(init, 0)
        os._exit(0)
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    mount_proc()  # refused if /proc is covered in part; other namespaces' processes then stay visible, but no more
    if program := os.fork():
        LIBC.prctl(PR_SET_DUMPABLE, 0)
        os.dup2(outcome, 0)
        os.closerange(1, 256)
        ended = 0
        while ended != program:
            ended, status, usage = os.wait4(-1, 0)
        os.write(0, marshal.dumps([status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss]))
        os._exit(0)
    return None


def reseed() -> None:
    """Give the program its own random numbers; `random` itself does that at every fork."""
    if "numpy.random" in sys.modules:  # with a seed from here, because numpy takes ten times as long to find one
        sys.modules["numpy.random"].seed(int.from_bytes(os.urandom(4), "little"))
    if "sympy.core.random" in sys.modules:
        sys.modules["sympy.core.random"].rng.seed()


# ---------------------------------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------------------------------


def restrict_imports(allowed: list[str], namespace: dict) -> None:
    """Refuse imports by the program itself that are not in `allowed`; allowed modules may import anything."""
    original = builtins.__import__

    def __import__(name, globals=None, locals=None, fromlist=(), level=0):  # the signature of the builtin
        if globals is namespace and name.partition(".")[0] not in allowed:
            raise ImportError(f"module {name!r} is not allowed here; these are: {', '.join(allowed)}", name=name)
        return original(name, globals, locals, fromlist, level)

    builtins.__import__ = __import__


def execute(code: str, name: str, show_last_expression: bool, namespace: dict) -> tuple[int, bool, bool]:
    """Run `code`; returns the exit code, whether memory ran out, and whether it asked to exit."""
    linecache.cache[name] = (len(code), None, code.splitlines(keepends=True), name)
    running = False
    try:
        tree = ast.parse(code.removeprefix("\ufeff"), name)
        last = tree.body.pop() if show_last_expression and tree.body and isinstance(tree.body[-1], ast.Expr) else None
        parts = [compile(tree, name, "exec", dont_inherit=True)]
        if last is not None:  # as the interactive prompt does: show the value unless it is None
            parts.append(compile(ast.Interactive([last]), name, "single", dont_inherit=True))
        running = True
        for part in parts:
            exec(part, namespace)
        return 0, False, False
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return (stop.code or 0) & 0xFF, False, True
        print(stop.code, file=sys.__stderr__)
        return 1, False, True
    except BaseException as error:
        print_traceback(error, running)
        # The parser raises MemoryError, too, for code nested too deeply.
        return 1, running and isinstance(error, MemoryError), False


def remove_own_frames(summary: traceback.TracebackException) -> None:
    """Remove the frames of this folder's files from a traceback and from those that led to it."""
    while summary is not None:
        for index in reversed(range(len(summary.stack))):
            if summary.stack[index].filename.startswith(INSIDE):
                del summary.stack[index]
        summary = summary.__cause__ or summary.__context__


def print_traceback(error: BaseException, running: bool) -> None:
    """Print the traceback without frames of this folder, or without any frame if the program was not `running`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        frames = error.__traceback__ if running else None
        summary = traceback.TracebackException(type(error), error, frames, compact=True)
        remove_own_frames(summary)
        for line in summary.format():
            print(line, file=sys.__stderr__, end="")
    except BaseException:  # not even memory for that, or the program closed the stream
        with contextlib.suppress(OSError):
            os.write(2, f"{type(error).__name__}\n".encode())
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def flush() -> None:
    """Send what the program has written so far, also what libraries in C have."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(BaseException):  # the program may have closed or replaced it
            stream.flush()
    with contextlib.suppress(BaseException):
        LIBC.fflush(None)


def cpu_seconds() -> float:
    """CPU time of this process and of the children it waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def serve_cells(request: dict, channel: socket.socket, base_bytes: int, namespace: dict) -> int:
    """Run cells in one namespace until one of them exits; returns the exit code."""
    number = 1
    while True:
        name = "<snippet>" if number == 1 else f"<snippet {number}>"
        limits = request["limits"]
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        wanted = base_bytes + (limits["memory_mb"] << 20)
        resource.setrlimit(resource.RLIMIT_AS, (min(wanted, hard), hard))
        cpu = cpu_seconds()
        report(f"started {time.monotonic()}")
        code, oom, leave = execute(request["code"], name, request["show_last_expression"], namespace)
        flush()
        if leave:
            return code
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.set_blocking(REPORT, True)  # the cell may have changed that
        if oom:
            report("oom")
        report(f"done {number} {code} {cpu_seconds() - cpu} {peak / 1024}")
        payload, descriptors = receive_packet(channel)
        request = unpack(payload, descriptors)
        os.dup2(descriptors[0], 0)
        os.close(descriptors[0])
        sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), encoding="utf-8", errors="surrogateescape")
        number += 1


def run_child(
    isolation: Isolation,
    filter_: seccomp.Filter | None,
    base_bytes: int,
    namespace: dict,
    descriptors: list[int],
) -> None:
    """Run a program from its fork to its end; never returns.

    `descriptors`: stdin, stdout, stderr and report, from which the request is read.
    """
    exit_code, ready = 1, False
    try:
        for target, source in enumerate(descriptors):
            os.dup2(source, target, target != REPORT)
        os.closerange(REPORT + 1, 256)
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET, 0, REPORT)
        request = unpack(*receive_packet(channel))
        confine(isolation, request, base_bytes)
        if filter_ is not None and isolation.nested:  # otherwise the fork server has installed it already
            seccomp.install(filter_)
        reseed()
        for stream in (sys.stdout, sys.stderr):
            output = stream.buffer
            os.register_at_fork(before=output.send_lines, after_in_child=output.detach_from_parent)
        gc.enable()
        if request["allowed_modules"]:
            restrict_imports(request["allowed_modules"], namespace)
        ready = True
        if request["session"]:
            exit_code = serve_cells(request, channel, base_bytes, namespace)
        else:
            report(f"started {time.monotonic()}")
            exit_code, oom, _ = execute(request["code"], "<snippet>", request["show_last_expression"], namespace)
            if oom:
                report("oom")
        if "threading" in sys.modules:
            sys.modules["threading"]._shutdown()
        atexit._run_exitfuncs()
        if request["fetch"]:  # as at the end of any Python, files that are still open are written and closed
            namespace.clear()
            gc.collect()
    except BaseException:
        if not ready:  # for the caller's log; later errors could only come from streams that the program broke
            traceback.print_exc(file=sys.__stderr__)
    finally:
        flush()
        os._exit(exit_code)
