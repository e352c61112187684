"""Attacks on memory, and on all other resources that can be used up."""

from .case import KILLED, Case, probe

MEMORY_OUT = ("oom", "user_error")


def stays_small(host, running) -> str:
    """Complain if the machine loses too much memory while the program runs."""
    lost = host.most_memory_mb(running)
    return f"the sandbox took {lost:.0f} MB of the host" if lost > 1150 else ""  # 256 MB + 384 MB of gVisor + tiers


MEMORY = [
    Case("memory", "one block", "x = bytearray(1 << 40)", status=("oom",), contains=("MemoryError",)),
    Case(
        "memory",
        "blocks in a list",
        "x = []\nwhile True:\n    x.append(bytearray(1 << 20))",
        status=("oom",),
        during=stays_small,
    ),
    Case("memory", "a text that doubles", "x = 'x'\nwhile True:\n    x += x", status=("oom",), during=stays_small),
    Case(
        "memory",
        "small objects",
        "x = []\nwhile True:\n    x.append([None] * 5000)",
        status=("oom",),
        wall_s=10.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "goes on after every MemoryError",
        "x = []\nwhile True:\n    try:\n        x.append(bytearray(10 ** 6))\n    except MemoryError:\n        pass",
        status=("timeout", "oom"),
        wall_s=1.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "twelve children of 150 MB",
        """
import os, time
for _ in range(12):
    if os.fork() == 0:
        x = bytearray(150 << 20)
        for at in range(0, len(x), 4096):
            x[at] = 1
        time.sleep(3)
for _ in range(12):
    os.wait()
""",
        status=("oom",),
        wall_s=8.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "files in memory",
        """
import os
kept, wrote = [], 0
try:
    for number in range(60):
        kept.append(os.memfd_create(str(number)))
        for _ in range(64):
            wrote += os.write(kept[-1], bytes(1 << 20))
except OSError:
    pass
print("REACHED" if wrote > 768 << 20 else "held")
""",
        status=("oom", "success"),
        wall_s=8.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "segments of System V",
        """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
taken = 0
for _ in range(100):
    segment = libc.shmget(0, 64 << 20, 0o1600)
    where = libc.shmat(segment, None, 0) if segment >= 0 else -1
    if where in (-1, None, 0xFFFFFFFFFFFFFFFF):
        break
    ctypes.memset(where, 1, 64 << 20)
    libc.shmdt(ctypes.c_void_p(where))
    taken += 64
print("REACHED" if taken > 1024 else "held")
""",
        status=("oom", "success", "user_error"),
        wall_s=8.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "maps more than there is",
        """
import mmap
x = []
while True:
    part = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
    for at in range(0, len(part), 4096):
        part[at] = 1
    x.append(part)
""",
        status=MEMORY_OUT,
        during=stays_small,
    ),
    Case(
        "memory",
        "fills the temporary folders",
        """
import os
for folder in (".", "/tmp", "/dev/shm", "/var/tmp"):
    wrote = 0
    try:
        for number in range(100):
            with open(f"{folder}/f{number}", "wb", buffering=0) as file:
                for _ in range(40):
                    wrote += file.write(bytes(1 << 20))
    except OSError:
        pass
    print("REACHED" if wrote > 300 << 20 else "held", folder)
""",
        status=("success", "oom"),
        wall_s=10.0,
        during=stays_small,
    ),
    Case(
        "memory",
        "fills pipes and sockets",
        """
import fcntl, os, socket
kept = []
try:
    while True:
        kept.append(os.pipe())
        try:
            fcntl.fcntl(kept[-1][1], 1031, 1 << 20)
        except OSError:
            pass
        os.set_blocking(kept[-1][1], False)
        while os.write(kept[-1][1], bytes(65536)):
            pass
except BlockingIOError:
    pass
except OSError:
    pass
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "memory",
        "an array too large",
        "import numpy\nx = numpy.ones(1 << 32)",
        status=("oom",),
        contains=("MemoryError",),
    ),
    Case(
        "memory",
        "a stack too deep",
        "import sys\nsys.setrecursionlimit(10 ** 8)\nf = lambda: f()\nf()",
        wall_s=1.0,
        status=KILLED,
    ),
    Case(
        "memory",
        "stacks for threads",
        """
import threading, time
threading.stack_size(512 << 20)
threads = [threading.Thread(target=time.sleep, args=(0.1,)) for _ in range(30)]
for thread in threads:
    thread.start()
""",
        status=MEMORY_OUT,
    ),
    probe(
        "memory",
        "locks its memory, or hides from the killer",
        """
block = ctypes.create_string_buffer(128 << 20)
attempt("mlock", lambda: syscall(149, ctypes.addressof(block), len(block)))
attempt("huge pages", lambda: syscall(9, 0, 1 << 30, 3, 0x40022, -1, 0))
for value in (b"-1000", b"-500", b"-1") if "@BACKEND@" != "gvisor" else ():  # gVisor's kernel has no such killer
    attempt("oom_score_adj", write, "/proc/self/oom_score_adj", value)
""",
    ),
]

RESOURCES = [
    Case(
        "resources",
        "sixty thousand files",
        """
made = 0
try:
    for made in range(60000):
        open(str(made), "w").close()
except OSError:
    pass
print("REACHED" if made > 21000 else "held")
""",
        status=("success", "timeout"),
        wall_s=3.0,
    ),
    Case(
        "resources",
        "folders four thousand deep",
        "import os\nfor _ in range(4000):\n    os.mkdir('d')\n    os.chdir('d')\nprint('ended')",
        stdout="ended\n",
    ),
    Case(
        "resources",
        "a file with a hole of a terabyte",
        "import os\ntry:\n    with open('f', 'wb') as file:\n        file.truncate(1 << 40)\n    print('REACHED')\n"
        "except OSError:\n    print('held')",
        stdout="held\n",
    ),
    Case(
        "resources",
        "a gigabyte reserved",
        "import os\nwith open('f', 'wb') as file:\n    try:\n        os.posix_fallocate(file.fileno(), 0, 1 << 30)\n"
        "        print('REACHED')\n    except OSError:\n        print('held')",
        stdout="held\n",
    ),
    Case(
        "resources",
        "descriptors without end",
        """
import os
kept = []
try:
    while len(kept) < 5000:
        kept.append(os.dup(0))
except OSError:
    pass
print("REACHED" if len(kept) > 200 else "held")
""",
        stdout="held\n",
    ),
    probe(
        "resources",
        "raises its limits",
        """
import resource
for name in ("AS", "FSIZE", "NOFILE", "NPROC", "CORE", "MEMLOCK"):
    kind = getattr(resource, "RLIMIT_" + name)
    hard = resource.getrlimit(kind)[1]
    if hard == resource.RLIM_INFINITY:
        print("REACHED no limit on", name) if name != "MEMLOCK" else None
        continue
    attempt(name, resource.setrlimit, kind, (hard + 1, hard + 1))
    attempt(name, resource.setrlimit, kind, (-1, -1))
    for pid in (1, os.getppid()):
        attempt(f"{name} of {pid}", resource.prlimit, pid, kind, (1, 1))
""",
    ),
    Case(
        "resources",
        "a core dump",
        "import ctypes, os, resource\n"
        "try:\n    resource.setrlimit(resource.RLIMIT_CORE, (-1, -1))\nexcept (ValueError, OSError):\n    pass\n"
        "if os.fork() == 0:\n    ctypes.string_at(0)\nstatus = os.wait()[1]\n"
        "print('REACHED' if os.WCOREDUMP(status) else 'held', os.listdir('.'))",
        stdout="held []\n",
    ),
    Case(
        "resources",
        "handles of every kind",
        """
import os, select, socket
makers = (select.epoll, lambda: os.eventfd(0), lambda: os.openpty(), lambda: socket.socketpair(),
          lambda: os.memfd_create("x"), lambda: os.open(".", os.O_TMPFILE | os.O_RDWR))
for make in makers:
    kept = []
    try:
        for _ in range(2000):
            kept.append(make())
        print("REACHED")
    except OSError:
        pass
    for item in kept:
        for end in item if isinstance(item, tuple) else (item,):
            os.close(end) if isinstance(end, int) else end.close()
print("held")
""",
        stdout="held\n",
    ),
    Case(
        "resources",
        "links without end",
        """
import os
open("f", "w").close()
made = 0
try:
    for made in range(100000):
        os.symlink("x" * 4000, f"s{made}")
except OSError:
    pass
print("REACHED" if made > 21000 else "held")
""",
        status=("success", "timeout"),
        wall_s=3.0,
        during=stays_small,
    ),
    Case(
        "resources",
        "semaphores and queues without end",
        """
import ctypes
libc = ctypes.CDLL(None)
for _ in range(4000):
    if libc.semget(0, 100, 0o1600) < 0:
        break
for _ in range(4000):
    if libc.msgget(0, 0o1600) < 0:
        break
print("ended")
""",
        status=("success", "timeout"),
        wall_s=4.0,
        during=stays_small,
    ),
    Case(
        "resources",
        "attributes and names of the greatest size",
        """
import os
for number in range(2000):
    try:
        name = f"{number:0255d}"
        open(name, "w").close()
        os.setxattr(name, "user.x", bytes(60000))
    except OSError:
        pass
print("ended")
""",
        stdout="ended\n",
        during=stays_small,
    ),
    Case(
        "resources",
        "locks on ranges",
        """
import fcntl, os
with open("f", "wb") as file:
    try:
        for at in range(0, 40000, 2):
            fcntl.lockf(file, fcntl.LOCK_EX, 1, at)
    except OSError:
        pass
print("ended")
""",
        status=("success", "timeout"),  # the kernel's list of them takes the time
        wall_s=1.0,
        during=stays_small,
    ),
]
