"""Attacks by and on processes."""

from .case import KILLED, Case, probe


def stays_few(host, running) -> str:
    """Complain if the host sees too many processes of the sandbox while the program runs."""
    most = host.most_processes(running)
    return f"{most} more processes on the host" if most > 140 else ""  # 64 allowed; gVisor needs up to 2 for one


PROCESSES = [
    probe(
        "processes",
        "sees the host's processes",
        """
for pid in (@PID@, *others()):
    try:
        words = read(f"/proc/{pid}/cmdline") + read(f"/proc/{pid}/comm")
    except OSError:
        continue
    if b"pytest" in words or b"sshd" in words or b"kthreadd" in words:
        print("REACHED", pid, words)
""",
        safe=True,
    ),
    probe(
        "processes",
        "reads what other processes hold",
        """
for pid in others():
    if os.stat(f"/proc/{pid}").st_uid == os.getuid():
        print("REACHED a process of the same user", pid)
    names = ["mem", "syscall", "stack", "io", "pagemap", "personality"]
    if "@BACKEND@" != "gvisor":  # gVisor shows these for every process, without anything of ours in them
        names += ["environ", "maps", "smaps", "auxv"]
    for name in names:
        attempt(f"{pid} {name}", lambda: read(f"/proc/{pid}/{name}", 100) or (_ for _ in ()).throw(OSError("empty")))
""",
    ),
    probe(
        "processes",
        "traces other processes",
        """
PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
for pid in others():
    for request in (PTRACE_ATTACH, PTRACE_SEIZE):
        attempt(f"ptrace {request} {pid}", syscall, 101, request, pid, 0, 0)
""",
    ),
    probe(
        "processes",
        "reads and writes other memories",
        """
import re, struct
here = ctypes.create_string_buffer(64)
for pid in others():
    for address in (0x400000, id(os), ctypes.addressof(here)):
        local, remote = (struct.pack("<QQ", where, 64) for where in (ctypes.addressof(here), address))
        attempt(f"readv {pid}", syscall, 310, pid, local, 1, remote, 1, 0)
        attempt(f"writev {pid}", syscall, 311, pid, local, 1, remote, 1, 0)
    attempt(f"mem {pid}", lambda: os.close(os.open(f"/proc/{pid}/mem", os.O_RDWR)))
""",
    ),
    probe(
        "processes",
        "takes descriptors of other processes",
        """
for pid in others():
    def take():
        handle = syscall(434, pid, 0)
        return [syscall(438, handle, number, 0) for number in range(8)]
    attempt(f"pidfd_getfd {pid}", take)
    for number in range(8):
        attempt(f"kcmp {pid}", syscall, 312, os.getpid(), pid, 0, 0, number)
""",
    ),
    Case(
        "processes",
        "fork bomb",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        status=("timeout",),
        wall_s=1.0,
        during=stays_few,
    ),
    Case(
        "processes",
        "fork bomb that sleeps and execs",
        """
import os, sys
for _ in range(200):
    try:
        if os.fork() == 0:
            os.setsid()
            os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)"])
    except OSError:
        break
print("ended")
""",
        status=("success", "timeout"),
        wall_s=2.0,
        during=stays_few,
    ),
    Case(
        "processes",
        "thread bomb",
        """
import threading, time
threading.stack_size(65536)
count = 0
try:
    while count < 1000:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except (RuntimeError, MemoryError):
    pass
print(count < 65)
""",
        stdout="True\n",
        during=stays_few,
    ),
    Case(
        "processes",
        "daemon by double fork",
        """
import os, sys
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in range(3):
            os.close(number)
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(60)", "@MARKER@"])
    os._exit(0)
os.wait()
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "names that are no text",
        """
import ctypes, os
for _ in range(20):
    if os.fork() == 0:
        break
ctypes.CDLL(None).prctl(15, b"\\xff) Z 1\\n", 0, 0, 0)
while True:
    pass
""",
        status=("timeout",),
        wall_s=0.6,
    ),
    Case(
        "processes",
        "sibling by CLONE_PARENT",
        """
import ctypes, os, signal, time
pid = ctypes.CDLL(None).syscall(56, 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
if pid == 0:
    time.sleep(60)
    os._exit(0)
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "child that holds the pipes",
        """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "child that runs from its killer by forking",
        """
import os, time
def run():
    os.setsid()
    while True:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            pass
for _ in range(8):
    try:
        if os.fork() == 0:
            run()
    except OSError:  # no room while dead processes are not gone yet
        pass
time.sleep(0.2)
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "threads that fork while the program ends",
        """
import os, threading, time
def forks():
    while True:
        try:
            if os.fork() == 0:
                time.sleep(60)
        except OSError:
            pass
for _ in range(4):
    threading.Thread(target=forks, daemon=True).start()
time.sleep(0.1)
os._exit(0)
""",
        status=(*KILLED, "success"),
        wall_s=2.0,
    ),
    Case(
        "processes",
        "children that attack their killer",
        """
import ctypes, os, signal, time
libc = ctypes.CDLL(None)
targets = [int(name) for name in os.listdir("/proc") if name.isdecimal() and int(name) != os.getpid()]
block = bytes(64)
for _ in range(8):
    if os.fork() == 0:
        os.setsid()
        while True:
            for pid in targets:
                for call in (lambda: os.setpriority(os.PRIO_PROCESS, pid, 19), lambda: os.kill(pid, signal.SIGSTOP),
                             lambda: os.sched_setaffinity(pid, {0}), lambda: os.kill(pid, signal.SIGKILL),
                             lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
                             lambda: libc.ptrace(0x4206, pid, 0, 0), lambda: open(f"/proc/{pid}/environ").read()):
                    try:
                        call()
                    except OSError:
                        pass
time.sleep(0.3)
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "zombies by the dozen",
        "import os, time\nfor _ in range(60):\n    try:\n        if os.fork() == 0:\n            os._exit(0)\n"
        "    except OSError:\n        break\nprint('ended')",
        stdout="ended\n",
    ),
    Case(
        "processes",
        "orphans with a reaper of their own",
        """
import ctypes, os, time
libc = ctypes.CDLL(None)
libc.prctl(36, 1, 0, 0, 0)
libc.prctl(1, 0, 0, 0, 0)
if os.fork() == 0:
    libc.prctl(36, 1, 0, 0, 0)
    for _ in range(5):
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
    os._exit(0)
print("ended")
""",
        stdout="ended\n",
    ),
    probe(
        "processes",
        "namespaces of its own gain nothing",
        """
if os.fork() == 0:
    for flags in (0x10000000, 0x10020000, 0x20000000, 0x40000000, 0x00020000, 0x7E020000):
        try:
            syscall(272, flags)
        except OSError:
            continue
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {os.getuid()} 1"), ("gid_map", f"0 {os.getgid()} 1")):
        try:
            write(f"/proc/self/{name}", text.encode())
        except OSError:
            pass
    attempt("canary", read, "@CANARY@")
    attempt("remount", syscall, 165, b"none", b"/", b"none", 32 | 4096, None)
    attempt("write", write, "/usr/planted")
    attempt("disk", lambda: (os.mknod("disk", 0o60666, os.makedev(254, 0)), read("disk")))
    attempt("hostname of 1", write, "/proc/1/root/planted")
    os._exit(0)
os.wait()
""",
    ),
    probe(
        "processes",
        "finds rare entries of the kernel",
        """
for name, number, words in (
    ("bpf", 321, (5, bytes(128), 128)),
    ("keyctl", 250, (0, -3, 1)), ("add_key", 248, (b"user", b"planted", b"x", 1, -3)),
    ("request_key", 249, (b"user", b"x", None, 0)),
    ("perf_event_open", 298, (bytes(128), 0, -1, -1, 0)),
    ("userfaultfd", 323, (0,)), ("init_module", 175, (b"x", 1, b"")), ("finit_module", 313, (0, b"", 0)),
    ("kexec_load", 246, (0, 0, None, 0)), ("swapon", 167, (b"/dev/null", 0)), ("acct", 163, (b"acct",)),
    ("quotactl", 179, (0x800002, b"/dev/vda", 0, None)), ("syslog", 103, (2, bytes(64), 64)), ("iopl", 172, (3,)),
    ("ioperm", 173, (0, 1, 1)), ("fanotify_init", 300, (0, 0)), ("lookup_dcookie", 212, (1, bytes(64), 64)),
    ("sethostname", 170, (b"taken", 5)), ("setdomainname", 171, (b"taken", 5)), ("vhangup", 153, ()),
    ("pivot_root", 155, (b"/", b"/")),
):
    attempt(name, syscall, number, *words)
if "@BACKEND@" != "gvisor":  # gVisor's kernel emulates these itself
    attempt("io_uring_setup", syscall, 425, 8, bytes(120))
    for flags in (0x10000000, 0x00020000, 0x40000000, 0x20000000, 0x02000000):
        attempt(f"unshare {flags:x}", syscall, 272, flags)
    if attempt("clone", syscall, 56, 0x10000000 | 17, 0, 0, 0, 0) == 0:
        os._exit(0)
""",
    ),
    probe(
        "processes",
        "takes over the machine",
        """
attempt("reboot", syscall, 169, 0xFEE1DEAD, 672274793, 0, None)  # switches Ctrl-Alt-Del off
attempt("clock_settime", lambda: __import__("time").clock_settime(0, 86400.0))
attempt("settimeofday", syscall, 164, bytes(16), None)
attempt("adjtimex", syscall, 159, (1).to_bytes(4, "little") + bytes(300))
if "@BACKEND@" != "gvisor":  # gVisor only stores the number
    attempt("nice", os.nice, -5)
    attempt("priority of 1", os.setpriority, os.PRIO_PROCESS, 1, 5)
attempt("real time", os.sched_setscheduler, 0, os.SCHED_FIFO, os.sched_param(1))
attempt("ioprio", syscall, 251, 1, 1, (1 << 13) | 1)
""",
    ),
]
