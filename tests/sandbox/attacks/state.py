"""Attacks on later calls: what a program leaves behind for the next one."""

from .case import ENDED, Case

STATE = [
    Case(
        "state",
        "files",
        """
import os
for folder in (".", "/tmp", "/var/tmp", "/dev/shm", os.environ["HOME"]):
    try:
        open(f"{folder}/left", "w").write("left")
    except OSError:
        pass
""",
        then=(
            (
                "import glob\nprint([p for d in ('.', '/tmp', '/var/tmp', '/dev/shm') for p in glob.glob(d + '/le*')])",
                "[]\n",
            ),
        ),
    ),
    Case(
        "state",
        "modules left for the next",
        """
for folder in (".", "/tmp", "/var/tmp", "/dev/shm"):
    for name in ("json", "numpy", "random", "sympy", "sitecustomize", "encodings", "site", "email"):
        try:
            open(f"{folder}/{name}.py", "w").write("print('REACHED')")
        except OSError:
            pass
""",
        then=(
            ("import json, random, numpy, email\nprint(json.dumps(1), numpy.zeros(1))", "1 [0.]\n"),
            ("import sympy\nprint(sympy.Integer(2))", "2\n"),
        ),
    ),
    Case(
        "state",
        "built-ins replaced",
        """
import builtins, json, math, os, sys
builtins.print = builtins.len = lambda *_: None
math.pi, json.dumps, os._exit = 3, None, os._exit
sys.setrecursionlimit(60)
builtins.__import__ = None
""",
        then=(("import math, json\nprint(len('ab'), math.pi > 3.1, json.dumps([]))", "2 True []\n"),),
        status=ENDED,
    ),
    Case(
        "state",
        "modules planted",
        """
import sys, types
sys.modules['fractions'] = types.ModuleType('fractions')
sys.modules['planted'] = sys
sys.path.insert(0, '/dev/shm')
""",
        then=(
            (
                """
import fractions, sys
print(fractions.Fraction(1, 2), 'planted' in sys.modules, '/dev/shm' in sys.path)
""",
                "1/2 False False\n",
            ),
        ),
    ),
    Case(
        "state",
        "libraries changed",
        """
import numpy, sympy, decimal
numpy.set_printoptions(precision=1)
numpy.pi = 3
sympy.pi = 3
decimal.getcontext().prec = 2
""",
        then=(
            (
                """
import numpy, sympy, decimal
print(numpy.array([1 / 3]), numpy.pi > 3, sympy.pi, decimal.Decimal(1) / 3)
""",
                "[0.33333333] True pi 0.3333333333333333333333333333\n",
            ),
        ),
    ),
    Case(
        "state",
        "environment, mask, folder and language",
        """
import locale, os, time
print(os.nice(0), end="")
os.environ["LEFT"] = os.environ["PATH"] = os.environ["PYTHONPATH"] = "left"
os.umask(0o777)
os.chdir("/")
os.environ["TZ"] = "Asia/Tokyo"
time.tzset()
os.nice(10)
None
""",
        then=(
            (
                """
import os, time
old = os.umask(0)
open('f', 'w')
print('LEFT' in os.environ, 'left' in os.environ['PATH'], oct(old), time.timezone, os.nice(0), os.listdir('.'))
""",
                "False False 0o22 0 @STDOUT@ ['f']\n",
            ),
        ),
    ),
    Case(
        "state",
        "priority and cores of everybody",
        """
import os
print(os.nice(0), sorted(os.sched_getaffinity(0)))
others = set(range(os.sysconf("SC_NPROCESSORS_ONLN"))) - os.sched_getaffinity(0) or {0}
for pid in (0, 1, os.getppid() or 1, *[int(name) for name in os.listdir("/proc") if name.isdecimal()]):
    for call in (lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), lambda: os.sched_setaffinity(pid, others)):
        try:
            call()
        except OSError:
            pass
""",
        then=tuple(
            (f"{first}import os\nprint(os.nice(0), sorted(os.sched_getaffinity(0)))", "@STDOUT@")
            for first in ("", "import numpy\n")
        ),
    ),
    Case(
        "state",
        "working folder destroyed",
        """
import os
for call in (lambda: os.chmod(".", 0), lambda: os.rmdir(os.getcwd()), lambda: os.rename(os.getcwd(), "/gone"),
             lambda: os.setxattr(".", "user.left", b"left")):
    try:
        call()
    except OSError:
        pass
""",
        then=(("import os\nopen('f', 'w').write('x')\nprint(open('f').read(), os.listxattr('.'))", "x []\n"),),
    ),
    Case(
        "state",
        "segments and queues of System V",
        """
import ctypes
libc = ctypes.CDLL(None)
print([libc.shmget(77, 4096, 0o1666) >= 0, libc.semget(77, 1, 0o1666) >= 0, libc.msgget(77, 0o1666) >= 0] is None)
""",
        then=(
            (
                """
import ctypes
libc = ctypes.CDLL(None)
print([libc.shmget(77, 4096, 0), libc.semget(77, 1, 0), libc.msgget(77, 0)])
""",
                "[-1, -1, -1]\n",
            ),
        ),
    ),
    Case(
        "state",
        "named queues and semaphores",
        """
import ctypes
rt = ctypes.CDLL(None)
for name in ("mq_open", "sem_open", "shm_open"):
    try:
        getattr(rt, name)(b"/left", 0o102, 0o666, 0)
    except AttributeError:
        pass
""",
        then=(
            (
                "import ctypes\nrt = ctypes.CDLL(None)\nrt.sem_open.restype = ctypes.c_void_p\n"
                "print(rt.mq_open(b'/left', 0), rt.sem_open(b'/left', 0), rt.shm_open(b'/left', 0, 0))",
                "-1 None -1\n",
            ),
        ),
        status=ENDED,
    ),
    Case(
        "state",
        "a server left behind",
        """
import os, socket, time
servers = [socket.create_server(("127.0.0.1", 5999)), socket.socket(socket.AF_UNIX)]
servers[1].bind("\\0left")
servers[1].listen()
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
""",
        then=(
            (
                """
import socket
for family, name in ((socket.AF_INET, ("127.0.0.1", 5999)), (socket.AF_UNIX, "\\0left")):
    try:
        socket.socket(family).connect(name)
        print("reached")
    except OSError:
        print("gone")
""",
                "gone\ngone\n",
            ),
        ),
        status=ENDED,
    ),
    Case(
        "state",
        "timers and handlers",
        "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.setitimer(signal.ITIMER_REAL, 0.3)",
        then=(
            (
                """
import signal, time
time.sleep(0.5)
print(signal.getsignal(signal.SIGTERM).name, signal.getitimer(0))
""",
                "SIG_DFL (0.0, 0.0)\n",
            ),
        ),
    ),
    Case(
        "state",
        "keys kept by the kernel",
        """
import ctypes
libc = ctypes.CDLL(None)
for ring in (-3, -4, -5):
    libc.syscall(248, b'user', b'left', b'x', 1, ring)
""",
        then=(("import ctypes\nprint(ctypes.CDLL(None).syscall(249, b'user', b'left', None, 0))", "-1\n"),),
    ),
    Case(
        "state",
        "the folder filled to the brim",
        "try:\n    for i in range(30000):\n        open(f'f{i}', 'w').close()\nexcept OSError:\n    pass",
        status=("success", "timeout"),
        wall_s=3.0,
        then=(("open('f', 'w').write('x' * 1000000)\nprint('room')", "room\n"),),
    ),
]
