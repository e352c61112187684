"""Attacks with signals."""

from .case import ENDED, KILLED, Case, loops, probe

SIGNALS = [
    probe(
        "signals",
        "kills and stops its parent",
        """
import signal
for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGSTOP", "SIGUSR1", "SIGCHLD", "SIGKILL"):
    attempt(name, os.kill, os.getppid() or 1, getattr(signal, name))
    attempt(name + " to 1", os.kill, 1, getattr(signal, name))
""",
    ),
    Case(
        "signals",
        "kills everybody at once",
        "import os\nos.kill(-1, 9)\nprint('ended')",
        status=ENDED,
    ),
    probe(
        "signals",
        "kills every number",
        """
import signal
for pid in (*range(1, 3000), @PID@, *others()):
    if pid != os.getpid():
        for number in (signal.SIGKILL, signal.SIGSTOP):
            attempt(f"{number} to {pid}", os.kill, pid, number)
""",
    ),
    Case("signals", "kills its group", "import os\nos.killpg(0, 9)", status=("user_error",), signal=9),
    Case(
        "signals",
        "stops everybody it can",
        "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.kill(-1, 19)\nlibc.kill(0, 19)\nprint('never')",
        status=("timeout",),
        wall_s=1.0,
    ),
    loops("signals", "stops itself", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    loops(
        "signals",
        "ignores every signal",
        """
import signal
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True:
    pass
""",
    ),
    loops(
        "signals",
        "a storm of alarms",
        "import signal\nsignal.signal(signal.SIGALRM, lambda *_: None)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\nwhile True:\n    pass",
    ),
    Case(
        "signals",
        "faults",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        status=("user_error",),
        signal=11,
    ),
    Case(
        "signals",
        "dies of a real-time signal",
        "import os\nos.kill(os.getpid(), 40)",
        status=("user_error",),
        signal=40,
    ),
    Case(
        "signals",
        "does not hear of its children",
        "import os, signal, sys\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nos.system('true')\nsys.exit(3)",
        status=("user_error",),
        check=lambda result: "" if result.return_code == 3 else f"return code {result.return_code}, not 3",
    ),
    probe(
        "signals",
        "has the kernel send its signals",
        """
import fcntl, signal
for target in (1, os.getppid(), -1, -os.getppid()):
    try:
        reading, writing = os.pipe()
        fcntl.fcntl(reading, 10, signal.SIGKILL)  # F_SETSIG
        fcntl.fcntl(reading, fcntl.F_SETOWN, target)
        fcntl.fcntl(reading, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
        signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 64))
        os.write(writing, b"x")
    except OSError:
        pass
for number in (129, 297):  # rt_sigqueueinfo, rt_tgsigqueueinfo
    for pid in (1, os.getppid()):
        words = (pid, signal.SIGKILL) if number == 129 else (pid, pid, signal.SIGKILL)
        attempt(f"queue {number}", syscall, number, *words, (9).to_bytes(4, "little") + bytes(124))
for pid in (1, os.getppid()):
    attempt("tgkill", syscall, 234, pid, pid, signal.SIGKILL)
    attempt("pidfd", lambda: syscall(424, syscall(434, pid, 0), signal.SIGKILL, None, 0))
""",
        status=KILLED + ENDED,
    ),
    probe(
        "signals",
        "types on the terminal",
        """
import fcntl
attempt("terminal", os.open, "/dev/tty", os.O_RDWR)
attempt("console", os.open, "/dev/console", os.O_RDWR)
for number in range(3):
    attempt(f"TIOCSTI {number}", fcntl.ioctl, number, 0x5412, b"x")
""",
    ),
]
