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
import select
import signal
import socket
import sys
from collections.abc import Callable

import seccomp
from child import fork_nested, prepare, run_child
from isolation import LIBC, PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, Isolation
from streams import ROOM_BYTES, kept_in
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


class Nursery:
    """The process from which all fork servers are forked.

    A program can read all that is in its memory when it is forked, and the supervisor's memory holds programs and
    outputs of earlier calls. The nursery is forked before the first call, and no call ever passes through it.
    """

    def __init__(self, isolation: Isolation, filter_: seccomp.Filter | None):
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = os.fork()
        if self.pid == 0:
            self._serve(other, isolation, filter_)
        other.close()

    def fork(self, name: str, end: socket.socket) -> int:
        """Fork a fork server that listens on `end`; returns its pid. Raises OSError or EOFError if that fails."""
        send_packet(self.channel, name, (end.fileno(),))
        return unpack(*receive_packet(self.channel))

    def _serve(self, channel: socket.socket, isolation: Isolation, filter_: seccomp.Filter | None) -> None:
        try:
            channel = keep_only(channel)
            while True:
                payload, (end,) = receive_packet(channel)
                with contextlib.suppress(ChildProcessError):
                    while os.waitpid(-1, os.WNOHANG)[0]:
                        pass
                pid = os.fork()
                if pid == 0:
                    serve(socket.socket(fileno=end), unpack(payload, []), isolation, filter_)
                    raise SystemExit  # a program that has replaced `os._exit` comes here
                os.close(end)
                send_packet(channel, pid)
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)


class Tier:
    """The supervisor's end of one fork server."""

    def __init__(self, name: str, nursery: Nursery):
        self.name = name
        self.channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.dead = False
        self.ready = False  # whether it has imported its packages
        self.subreaper = True  # whether it adopts its programs' orphans, and not the supervisor
        try:
            self.pid = nursery.fork(name, other)
        except (EOFError, OSError):
            self.dead = True
        other.close()

    def receive(self) -> list | None:
        """Its next message; None once it is dead. What a program had not sent follows the message, as it lies there."""
        try:
            payload, descriptors = receive_packet(self.channel)
            message = unpack(payload, descriptors)
        except (EOFError, OSError):
            self.dead = True
            return None
        if message[0] == "ready":
            self.ready, self.subreaper = True, message[1]
        elif message[0] == "ended":
            unsent = payload[len(payload) - message.pop() :]
            message.append([kept_in(unsent[at : at + ROOM_BYTES]) for at in range(0, len(unsent), ROOM_BYTES)])
        return message

    def has_ended(self) -> bool:
        """Whether it is dead. Call it only between two programs, when no message of it is expected."""
        while not self.dead and select.select([self.channel], [], [], 0)[0]:
            self.receive()
        return self.dead

    def await_ready(self, timeout_s: float) -> None:
        """Wait until it serves; one that takes longer than `timeout_s` counts as dead."""
        if not self.ready:
            self.channel.settimeout(max(timeout_s, 0.001))
            self.receive()
            self.channel.settimeout(None)

    def fork(self, descriptors: tuple[int, ...]) -> None:
        """Have it fork a program with these descriptors; see `run_child`."""
        try:
            send_packet(self.channel, None, descriptors)
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


def keep_only(channel: socket.socket) -> socket.socket:
    """In a new process of the machinery: close all other descriptors, and end with the parent; returns the channel."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.dup2(channel.fileno(), 3)
    channel.detach()
    os.closerange(4, 256)
    return socket.socket(fileno=3)


def serve(channel: socket.socket, name: str, isolation: Isolation, filter_: seccomp.Filter | None) -> None:
    """Run a fork server until its end; never returns.

    Nothing of a program may come into its memory, since the next program gets a copy of it. So a program reads its
    request itself, and what it left in the buffers of its streams is sent from there.
    """
    try:
        channel = keep_only(channel)
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
            _, descriptors = receive_packet(channel)
            for output in outputs:
                output.clear()
            ended = run_program(descriptors, isolation, child)
            clean = not has_children()
            unsent = [output.memory for output in outputs] if any(output.used for output in outputs) else []
            message = marshal.dumps(["ended", *ended, clean, len(unsent) * ROOM_BYTES])
            channel.sendmsg([message, *unsent])
            if not clean:
                reap_all()
                send_packet(channel, ["gone"])
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def run_program(descriptors: list[int], isolation: Isolation, child: Callable[[list[int]], None]) -> list:
    """Fork a program and wait for its end; returns the wait status, user and system seconds and peak size in KiB.

    `child` runs the program; it never returns.
    """
    outcome = outcome_end = None
    if isolation.nested:
        outcome, outcome_end = os.pipe()
        pid = fork_nested(outcome_end)
    else:
        pid = os.fork()
    if not pid:
        child(descriptors)
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
