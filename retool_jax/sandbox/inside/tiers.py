"""Fork servers: processes with packages already imported, so that a program that needs these starts as fast as a fork.

The more memory a process has, the more its fork costs. So there are several: a print is forked from a small one, a
symbolic integral from one in which sympy is loaded and its caches are warm.
"""

import contextlib
import functools
import gc
import importlib.util
import marshal
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable

import seccomp
from child import fork_nested, prepare, run_child
from isolation import LIBC, PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, Isolation
from wire import receive_packet, send_packet, unpack

PRELOADED = {
    "base": (
        *("bisect", "cmath", "collections", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"),
        *("math", "operator", "random", "re", "statistics", "string"),
    ),
    # numpy imports these three only when they are first used
    "numpy": ("numpy", "numpy.random", "numpy.linalg", "numpy.fft"),
    "sympy": ("sympy",),
    "scipy": ("scipy.optimize", "scipy.stats"),
}
ANCESTORS = {"base": (), "numpy": (), "sympy": ("numpy",), "scipy": ("numpy",)}
WARM_UP = """
from sympy import Eq, Rational, cos, exp, integrate, simplify, sin, solve, symbols
x, y = symbols("x y")
solve(x**2 - 3*x + 2, x), solve([Eq(x + y, 3), Eq(x - y, 1)], [x, y])
simplify(sin(x)**2 + cos(x)**2), integrate(x**2 * exp(x), x), integrate(sin(x), (x, 0, 1)), str(Rational(1, 3) + x)
"""


def available(names: list[str]) -> list[str]:
    """The tiers whose packages are installed."""
    return [name for name in names if name == "base" or importlib.util.find_spec(name) is not None]


class Tier:
    """The supervisor's end of one fork server."""

    def __init__(self, name: str, isolation: Isolation, filter_: seccomp.Filter | None):
        self.name = name
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.dead = False
        self.ready = False  # whether it has imported its packages
        self.subreaper = True  # whether it adopts its programs' orphans, and not the supervisor
        self.pid = os.fork()
        if self.pid == 0:
            serve(other, name, isolation, filter_)
        other.close()

    def receive(self) -> list | None:
        """Its next message; None once it is dead."""
        try:
            message = unpack(*receive_packet(self.channel))
        except (EOFError, OSError):
            self.dead = True
            return None
        if message[0] == "ready":
            self.ready, self.subreaper = True, message[1]
        return message

    def await_ready(self, timeout_s: float) -> None:
        """Wait until it serves; one that takes longer than `timeout_s` counts as dead."""
        if not self.ready:
            self.channel.settimeout(max(timeout_s, 0.001))
            self.receive()
            self.channel.settimeout(None)

    def send(self, request: dict, descriptors: tuple[int, ...]) -> None:
        try:
            send_packet(self.channel, request, descriptors)
        except OSError:
            self.dead = True


def address_space() -> int:
    """Bytes of address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def preload(name: str) -> None:
    for tier in (*ANCESTORS[name], "base", name):
        for module in PRELOADED[tier]:
            with contextlib.suppress(ImportError):  # its programs will get the error themselves
                __import__(module)
    if name == "sympy" and "sympy" in sys.modules:
        exec(WARM_UP, {})


def serve(channel: socket.socket, name: str, isolation: Isolation, filter_: seccomp.Filter | None) -> None:
    """Run a fork server until its end; never returns."""
    try:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(channel.fileno(), 3)
        channel.detach()
        os.closerange(4, 256)
        channel = socket.socket(fileno=3)
        subreaper = LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
        preload(name)
        if filter_ is not None and not isolation.nested:
            seccomp.install(filter_)
        namespace, outputs = prepare()
        gc.collect()
        gc.freeze()  # a collection in a child then does not touch these pages, so they are not copied
        gc.disable()
        child = functools.partial(run_child, isolation, filter_, address_space(), namespace)
        send_packet(channel, ["ready", subreaper])
        while True:
            payload, descriptors = receive_packet(channel)
            for output in outputs:
                output.clear()
            ended = run_program(payload, descriptors, isolation, child)
            clean = not has_children()
            send_packet(channel, ["ended", *ended, clean, [output.kept() for output in outputs]])
            if not clean:
                reap_all()
                send_packet(channel, ["gone"])
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def run_program(
    payload: bytes,
    descriptors: list[int],
    isolation: Isolation,
    child: Callable[[bytes, list[int]], None],
) -> list:
    """Fork a program and wait for its end; returns the wait status, user and system seconds and peak size in KiB.

    `child` runs the program in the packet; it never returns.
    """
    outcome = outcome_end = None
    if isolation.nested:
        outcome, outcome_end = os.pipe()
        pid = fork_nested(outcome_end)
    else:
        pid = os.fork()
    if not pid:
        child(payload, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    ended = 0
    while ended != pid:  # reap orphans too: a zombie would count as a process of the program
        ended, status, usage = os.wait4(-1, 0)
    if outcome is None:
        return [status, usage.ru_utime, usage.ru_stime, usage.ru_maxrss]
    os.close(outcome_end)
    data = os.read(outcome, 4096)
    os.close(outcome)
    return marshal.loads(data) if data else [int(signal.SIGKILL), 0.0, 0.0, 0]


def has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def reap_all() -> None:
    """Wait until every process of the call is dead; the supervisor kills them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait4(-1, 0)
