"""Attacks on the clock, on the output streams, and on their encodings."""

from retool_jax.sandbox import ToolResult

from .case import ENDED, Case, loops, probe

FLOOD = {"status": ("output_limit",), "wall_s": 10.0, "within_s": 0.0}


def near(limit_s: float):
    """Complain about a call that ran past its limit by its own clock."""

    def check(result: ToolResult) -> str:
        return "" if limit_s - 0.1 <= result.wall_s <= limit_s + 5.0 else f"wall_s {result.wall_s:.2f}, limit {limit_s}"

    return check


TIME = [
    loops("time", "a loop", "while True:\n    pass", check=near(0.4)),
    loops(
        "time",
        "a loop that swallows everything",
        """
import time
while True:
    try:
        while True:
            time.sleep(0.01)
    except BaseException:
        pass
""",
    ),
    loops("time", "arithmetic within one instruction", "x = 7 ** (7 ** 9)"),
    loops("time", "a number printed", "import sys\nsys.set_int_max_str_digits(0)\nprint(10 ** 9000000 + 1)"),
    loops("time", "a regular expression", "import re\nre.match(r'(a*)*b', 'a' * 40)"),
    loops("time", "sleep", "import time\ntime.sleep(1000)"),
    loops("time", "a read that never ends", "import os\nos.read(os.pipe()[0], 1)"),
    loops(
        "time",
        "a thread that lives on",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
    ),
    loops(
        "time",
        "a loop at exit",
        "import atexit, time\natexit.register(time.sleep, 60)\nprint('before')",
        stdout="before\n",
        wall_s=0.8,
    ),
    loops(
        "time",
        "a loop in a finaliser",
        "import time\nclass X:\n    def __del__(self):\n        time.sleep(60)\nx = X()\ndel x",
    ),
    loops(
        "time",
        "a loop in the error's text",
        "class X(Exception):\n    def __str__(self):\n        while True:\n            pass\nraise X",
    ),
    loops(
        "time",
        "a child that it waits for",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'while True: pass'])",
        wall_s=0.6,
    ),
    loops("time", "a deadlock", "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"),
    loops("time", "vfork", "import ctypes, os\nif ctypes.CDLL(None).vfork() == 0:\n    while True:\n        pass"),
    Case("time", "a prompt without input", "input('name? ')", status=("user_error",), contains=("EOFError", "name? ")),
    loops(
        "time", "keeps what was printed before", "print('before')\nwhile True:\n    pass", stdout="before\n", wall_s=0.8
    ),
    Case(
        "time",
        "turns the clocks it can reach",
        """
import signal, time
time.monotonic = time.time = lambda: 0.0
signal.setitimer(signal.ITIMER_REAL, 1000)
try:
    time.clock_settime(time.CLOCK_REALTIME, 0)
    print("REACHED")
except OSError:
    pass
while True:
    pass
""",
        status=("timeout",),
        wall_s=1.0,
        within_s=2.0,
    ),
]


def counted(stdout: int, stderr: int = 0):
    """Complain unless exactly so many bytes were counted."""

    def check(result: ToolResult) -> str:
        have = result.stdout_bytes, result.stderr_bytes
        return "" if have == (stdout, stderr) else f"counted {have}, not {(stdout, stderr)}"

    return check


def short(result: ToolResult) -> str:
    """Complain if more came back than the limit keeps."""
    size = max(len(result.stdout), len(result.stderr))
    return "" if size < 80000 and (result.stdout_truncated or result.stderr_truncated) else f"kept {size}, cut nothing"


OUTPUT = [
    Case(
        "output",
        "a gigabyte",
        "import sys\nx = 'x' * (64 << 20)\nfor _ in range(16):\n    sys.stdout.write(x)",
        check=short,
        **FLOOD,
    ),
    Case("output", "without end", "while True:\n    print('y' * 100)", check=short, **FLOOD),
    Case(
        "output",
        "without a line's end",
        "import sys\nwhile True:\n    sys.stdout.write('z' * 50)",
        check=short,
        **FLOOD,
    ),
    Case(
        "output", "errors without end", "import sys\nwhile True:\n    sys.stderr.write('e' * 100)", check=short, **FLOOD
    ),
    Case(
        "output",
        "both in turn",
        "import os\nwhile True:\n    os.write(1, b'o' * 999)\n    os.write(2, b'e' * 999)",
        check=short,
        **FLOOD,
    ),
    Case(
        "output",
        "by the kernel's copy",
        """
import os
with open("f", "wb") as file:
    file.write(bytes(1 << 20))
source = os.open("f", os.O_RDONLY)
while True:
    try:
        os.sendfile(1, source, 0, 1 << 20)
    except OSError:
        os.write(1, bytes(65536))
""",
        **FLOOD,
    ),
    Case(
        "output",
        "from many children",
        "import os\nfor _ in range(5):\n    os.fork()\nwhile True:\n    os.write(1, b'c' * 65536)",
        **FLOOD,
    ),
    Case("output", "200 KB", "print('x' * 199999)", check=counted(200000)),
    Case(
        "output",
        "just below the limit",
        "import os\nfor _ in range(1 << 7):\n    os.write(1, b'x' * 65536)",
        check=counted(8 << 20),
    ),
    Case(
        "output",
        "head and tail are kept",
        "for i in range(30000):\n    print(i)",
        contains=("0\n1\n2\n", "29998\n29999\n", "bytes removed"),
        check=counted(sum(len(str(i)) + 1 for i in range(30000))),
        wall_s=30.0,
    ),
    Case(
        "output",
        "a child that goes on after the end",
        "import os, time\nparent = os.getpid()\nif os.fork() == 0:\n    while os.getppid() == parent:\n"
        "        time.sleep(0.001)\n    while True:\n        os.write(1, b'later')\nprint('ended')",
        contains=("ended",),
        status=("success", "output_limit"),
    ),
    Case(
        "output",
        "closed streams",
        "import os, sys\nprint('first')\nsys.stdout.close()\nos.close(1)\nos.close(2)",
        stdout="first\n",
    ),
    Case(
        "output",
        "streams turned over",
        """
import fcntl, os
for number in (1, 2):
    fcntl.fcntl(number, fcntl.F_SETFL, os.O_NONBLOCK)
    for size in (1 << 20, 4096):
        try:
            fcntl.fcntl(number, 1031, size)
        except OSError:
            pass
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "output",
        "its own pipe read and reopened",
        """
import os
for path in ("/proc/self/fd/1", "/dev/stdout"):
    try:
        os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b"again\\n")
        os.set_blocking(os.open(path, os.O_RDONLY | os.O_NONBLOCK), False)
    except OSError:
        pass
os.write(1, b"ended\\n")
""",
        contains=("ended",),
    ),
    Case("output", "ends without a word", "import os\nos.write(1, b'half')\nos._exit(0)", stdout="half"),
]

BYTES = "import os\nos.write(1, bytes(range(128, 256)))\nNone"
ENCODING = [
    Case("encoding", "bytes that are no text", BYTES, check=counted(128), contains=("\ufffd",)),
    Case("encoding", "lone surrogates in the code", "x = '\ud800'\nprint('a')", status=ENDED),
    Case("encoding", "lone surrogates printed", "print('\\ud800')", stdout="\\ud800\n"),
    Case(
        "encoding",
        "lone surrogates in the input",
        "import sys\nprint(len(sys.stdin.buffer.read()))",
        stdin="\udcff\ud800",
        stdout="6\n",
    ),
    Case("encoding", "byte order mark", "\ufeffprint('a')", stdout="a\n"),
    Case("encoding", "NUL in the code", "print('a')\0", status=("rejected",)),
    Case("encoding", "NUL in the output", "print('a\\0b')", stdout="a\0b\n"),
    Case(
        "encoding",
        "line ends of three kinds",
        "print('a')\r\nif True:\r\n    print('b')\rprint('c')\n",
        stdout="a\nb\nc\n",
    ),
    Case("encoding", "a cookie that names another encoding", "# -*- coding: utf-16 -*-\nprint('ä')", stdout="ä\n"),
    Case("encoding", "a cookie for UTF-7", "# coding: utf-7\nx = 1 #+AAo-print('REACHED')\nprint('a')", stdout="a\n"),
    Case("encoding", "a line of 1.5 MB", f"x = '{'a' * 1_500_000}'\nprint(len(x))", stdout="1500000\n"),
    Case(
        "encoding",
        "characters cut in two",
        "print('€' * 100000)",
        contains=("€", "bytes removed"),
        check=counted(300001),
    ),
    Case("encoding", "nothing at all", "", stdout=""),
    Case("encoding", "only a comment", "# nothing", stdout=""),
    Case(
        "encoding",
        "separators that only look like line ends",
        "x = 'a\u2028b\u0085c\x0cd'\nprint(len(x))",
        stdout="7\n",
    ),
    Case("encoding", "code beyond the limit", "#" * ((2 << 20) + 1), status=("rejected",)),
    Case("encoding", "input beyond the limit", "print(1)", stdin="x" * ((8 << 20) + 1), status=("rejected",)),
    Case(
        "encoding",
        "input at the limit",
        "import sys\nprint(len(sys.stdin.read()))",
        stdin="x" * (8 << 20),
        stdout=f"{8 << 20}\n",
    ),
    probe(
        "encoding",
        "names that are no text",
        """
for name in (b"\\xff\\xfe", b"a\\nb", b"\\x1b[31m", "\\u202e".encode(), b"-rf"):
    os.mkdir(name)
    open(name + b"/x", "w").close()
print(ascii(os.listdir(".")))
""",
        fetch=("-rf/x",),
        check=lambda result: "" if result.files == {"-rf/x": b""} else f"fetched {result.files}",
    ),
]
