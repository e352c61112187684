"""Attacks within a session: on its interpreter, and on its channels to the sandbox."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One piece of code in a session."""

    code: str
    stdout: str | None = None
    status: tuple[str, ...] = ("success",)
    wall_s: float = 5.0


@dataclass(frozen=True)
class Session:
    """Cells that run in order in one session; afterwards a new session must find nothing of them."""

    name: str
    cells: tuple[Cell, ...]


FRESH = Cell("print('x' in globals())", "False\n")
KEPT = Cell("print(x)", "1\n")
SET = Cell("x = 1")
OVER = ("user_error", "success", "oom", "output_limit", "timeout")
MAYBE = Cell("print(x if 'x' in globals() else 1)", "1\n")  # the interpreter may live on or not
AFTER = Cell("x", status=OVER)  # it may be broken, but the result must not be a fault of the machinery
LIES = """
import os
for text in (b"started nan", b"done nan nan nan", b"done 0 inf inf", b"done 0 -1 1e308", b"started 1e999", b"gone"):
    try:
        os.write(3, text)
    except OSError:
        pass
"""

SESSIONS = [
    Session("lies about the end of a cell", (SET, Cell(LIES, status=OVER), Cell(LIES, status=OVER), AFTER, MAYBE)),
    Session(
        "state is kept",
        (
            SET,
            Cell("import os\nopen('f', 'w').write('f')\ndef f():\n    return x"),
            Cell("print(f(), open('f').read())", "1 f\n"),
        ),
    ),
    Session("an error ends a cell, not the session", (SET, Cell("1 / 0", status=("user_error",)), KEPT)),
    Session("time runs out", (SET, Cell("while True:\n    pass", status=("timeout",), wall_s=0.7), FRESH)),
    Session("memory runs out", (SET, Cell("y = bytearray(1 << 40)", status=("oom",)), MAYBE)),
    Session("too much output", (SET, Cell("while True:\n    print('x' * 1000)", status=("output_limit",)), FRESH)),
    Session("kills itself", (SET, Cell("import os\nos.kill(os.getpid(), 9)", status=("user_error",)), FRESH)),
    Session("exits", (SET, Cell("import os\nos._exit(0)", status=("success", "user_error")), FRESH)),
    Session("leaves by SystemExit", (SET, Cell("raise SystemExit(3)", status=("user_error",)), MAYBE)),
    Session(
        "closes every descriptor", (SET, Cell("import os\nos.closerange(0, 4096)", status=OVER, wall_s=1.0), AFTER)
    ),
    Session(
        "writes on every descriptor",
        (
            SET,
            Cell(
                """
import os, json, struct
body = json.dumps({'result': {'status': 'success'}, 'streams': [], 'forged': 1}).encode()
for n in range(3, 256):
    try:
        os.set_blocking(n, False)
        os.write(n, struct.pack('>I', len(body)) + body)
        os.write(n, bytes(10))
    except OSError:
        pass
""",
                status=OVER,
                wall_s=1.0,
            ),
            AFTER,
            AFTER,
            MAYBE,
        ),
    ),
    Session(
        "reads every descriptor",
        (
            SET,
            Cell(
                """
import os
for n in range(256):
    try:
        os.set_blocking(n, False)
        os.read(n, 65536)
    except OSError:
        pass
""",
                status=OVER,
                wall_s=1.0,
            ),
            AFTER,
            MAYBE,
        ),
    ),
    Session(
        "a thread that floods between the cells",
        (
            SET,
            Cell(
                """
import os, threading
def flood():
    while True:
        os.write(1, b'f' * 4096)
threading.Thread(target=flood, daemon=True).start()
""",
                status=OVER,
                wall_s=1.0,
            ),
            Cell("print(1)", status=OVER, wall_s=1.0),
            Cell("print(1)", status=OVER, wall_s=1.0),
        ),
    ),
    Session(
        "a child that floods between the cells",
        (
            SET,
            Cell(
                "import os\nif os.fork() == 0:\n    while True:\n        os.write(1, b'f' * 4096)",
                status=OVER,
                wall_s=1.0,
            ),
            Cell("print(1)", status=OVER, wall_s=1.0),
        ),
    ),
    Session(
        "a child that becomes a second interpreter",
        (
            SET,
            Cell("import os\nos.fork()\nx = 1", status=OVER, wall_s=1.0),
            Cell("print(x if 'x' in globals() else 1)", status=OVER, wall_s=1.0),
            Cell("print(1)", status=OVER, wall_s=1.0),
        ),
    ),
    Session(
        "streams replaced by nonsense",
        (SET, Cell("import sys\nsys.stdout = sys.stderr = sys.__stdout__ = None", status=OVER), Cell("x", status=OVER)),
    ),
    Session(
        "built-ins emptied",
        (
            SET,
            Cell("import builtins, sys\nsys.modules.clear()\nbuiltins.__dict__.clear()", status=OVER),
            Cell("1", status=OVER),
        ),
    ),
    Session(
        "a fork bomb",
        (
            SET,
            Cell(
                "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
                status=("timeout",),
                wall_s=0.7,
            ),
            FRESH,
        ),
    ),
    Session(
        "says that its cells are done and takes none of them",
        (
            Cell(
                """
import os, time
n = 1
while True:
    try:
        os.write(3, f"done {n // 4 + 1} 0 0 0".encode())
    except OSError:
        pass
    n += 1
    time.sleep(0.01)
""",
                status=OVER,
                wall_s=1.0,
            ),
            *[Cell("#" * 55_000, status=OVER, wall_s=1.0)] * 8,
        ),
    ),
    Session(
        "a thread that talks to the sandbox without end",
        (
            SET,
            Cell(
                """
import os, threading
def talk():
    while True:
        os.write(3, b"oo")
for _ in range(4):
    threading.Thread(target=talk, daemon=True).start()
""",
                status=OVER,
                wall_s=1.0,
            ),
            AFTER,
            Cell("print(1)", status=OVER, wall_s=1.0),
        ),
    ),
    Session(
        "children that take all memory between the cells",
        (
            Cell(
                """
import os, time
for _ in range(20):
    if os.fork() == 0:
        time.sleep(0.3)
        x = bytearray(50 << 20)
        for at in range(0, len(x), 4096):
            x[at] = 1
        time.sleep(60)
""",
                status=OVER,
                wall_s=2.0,
            ),
            Cell("import time\ntime.sleep(1)", status=OVER, wall_s=3.0),
            Cell("print(1)", status=OVER, wall_s=2.0),
            Cell("print(1)", status=OVER, wall_s=2.0),
        ),
    ),
    Session(
        "time runs out twice",
        (
            Cell("import time\ntime.sleep(60)", status=("timeout",), wall_s=0.5),
            Cell("import time\ntime.sleep(60)", status=("timeout",), wall_s=0.5),
            FRESH,
        ),
    ),
    Session("stops itself", (SET, Cell("import os\nos.kill(os.getpid(), 19)", status=("timeout",), wall_s=0.7), FRESH)),
]
