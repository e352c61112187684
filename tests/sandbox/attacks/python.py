"""Attacks from within the interpreter: on its machinery, and on our code in the same process."""

from .case import ENDED, Case, probe

PYTHON = [
    Case("python", "a null pointer", "import ctypes\nctypes.string_at(0)", status=("user_error",), signal=11),
    Case(
        "python",
        "abort",
        "import os\nprint('before', flush=True)\nos.abort()",
        status=("user_error",),
        signal=6,
        stdout="before\n",
    ),
    Case(
        "python",
        "broken bytecode",
        "f = lambda: 0\nf.__code__ = f.__code__.replace(co_code=bytes([100, 255] * 50))\nf()\nprint()",
        status=("user_error", "success"),
    ),
    probe(
        "python",
        "searches all objects for secrets",
        """
import gc
head, tail = "@SECRET_HEAD@", "@SECRET_TAIL@"  # not joined here, or this program would find itself
def search(where, data):
    at = data.find(head.encode())
    while at >= 0:
        if data[at + len(head) : at + len(head) + 1 + len(tail)].endswith(tail.encode()):
            print("REACHED", where)
        at = data.find(head.encode(), at + 1)
for item in gc.get_objects():
    if type(item) in (dict, list, tuple, set) and len(item) < 5000:
        try:
            search("an object", repr(item).encode())
        except Exception:
            pass
for line in read("/proc/self/maps", 1 << 20).decode().splitlines():
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    if line.split()[1].startswith("rw") and end - start < 64 << 20:
        try:
            with open("/proc/self/mem", "rb") as file:
                file.seek(start)
                search(line, file.read(end - start))
        except OSError:
            pass
""",
        safe=True,
    ),
    probe(
        "python",
        "walks up the frames",
        """
import gc
frame = sys._getframe()
while frame is not None:
    for name, value in {**frame.f_locals, **frame.f_globals}.items():
        if type(value).__name__ == "socket" and value.fileno() not in (-1, 3):  # 3: the program's own report
            print("REACHED", frame.f_code.co_name, name)
    frame = frame.f_back
""",
    ),
    Case(
        "python",
        "frames of ours in a traceback",
        "def f():\n    1 / 0\nf()",
        status=("user_error",),
        contains=("ZeroDivisionError", "    1 / 0", "line 2, in f"),
        check=lambda result: "shows our frames" if "supervisor" in result.stderr or "child" in result.stderr else "",
    ),
    Case(
        "python",
        "exit switched off",
        "import os, sys\nos._exit = sys.exit = os.abort = os.kill = lambda *_: None\nprint('ended')",
        stdout="ended\n",
        status=ENDED,
    ),
    Case(
        "python",
        "every exit raises",
        """
import atexit, os, threading
def refuse(*_, **__):
    raise SystemError("no")
os._exit = threading._shutdown = atexit._run_exitfuncs = refuse
print("ended")
""",
        stdout="ended\n",
        status=ENDED,
    ),
    Case(
        "python",
        "returns into the fork server",
        """
import os, sys
os._exit = lambda code: None
for frame in (sys._getframe(1), sys._getframe(1).f_back):
    if frame is not None:
        frame.f_globals.update({name: (lambda *_, **__: None) for name in ("os", "_exit") if name in frame.f_globals})
print("ended")
""",
        status=ENDED,
    ),
    Case(
        "python",
        "our functions replaced",
        """
import sys
seen = set()
frame = sys._getframe(1)
while frame is not None:
    for name, value in list(frame.f_globals.items()):
        if callable(value) and not name.startswith("__") and frame.f_globals is not globals():
            frame.f_globals[name] = lambda *_, **__: None
    frame = frame.f_back
print("ended")
""",
        status=(*ENDED, "timeout"),
        wall_s=2.0,
    ),
    Case(
        "python",
        "tracing our frames",
        """
import sys
def trace(frame, event, argument):
    raise ValueError("traced")
frame = sys._getframe()
while frame.f_back is not None:
    frame = frame.f_back
    frame.f_trace = trace
sys.settrace(trace)
sys.setprofile(trace)
""",
        status=ENDED,
    ),
    Case(
        "python",
        "hooks on everything",
        "import sys\ndef hook(name, words):\n    raise RuntimeError(name)\nsys.addaudithook(hook)\nopen('f')",
        status=("user_error",),
    ),
    Case(
        "python",
        "modules and built-ins emptied",
        "import builtins, sys\nsys.modules.clear()\nbuiltins.__dict__.clear()",
        status=ENDED,
    ),
    Case(
        "python",
        "streams replaced by nonsense",
        "import sys\nsys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = 5\nraise ValueError",
        status=("user_error",),
    ),
    Case(
        "python",
        "an error whose text raises",
        """
class X(BaseException):
    def __str__(self):
        raise KeyboardInterrupt
    __repr__ = __str__
raise X
""",
        status=("user_error",),
    ),
    Case(
        "python",
        "an exit code that bites",
        "class X:\n    def __str__(self):\n        import os\n        os._exit(7)\nraise SystemExit(X())",
        status=("user_error",),
    ),
    Case("python", "exit codes beyond a byte", "import sys\nsys.exit(1 << 70)", status=ENDED),
    Case(
        "python",
        "a chain of errors without end",
        "e = ValueError()\ne.__cause__ = e.__context__ = e\nraise e",
        status=("user_error",),
        contains=("ValueError",),
    ),
    Case("python", "a hundred thousand brackets", "(" * 100000, status=("user_error",), contains=("Error",)),
    Case(
        "python", "a sum of fifty thousand terms", "x = " + "+".join(["1"] * 50000) + "\nprint('ended')", status=ENDED
    ),
    Case(
        "python",
        "blocks within blocks",
        "\n".join(" " * i + "if 1:" for i in range(110)) + "\n" + " " * 110 + "print(1)",
        status=("user_error",),
        contains=("Error",),
    ),
    Case("python", "calls within calls", "f = lambda: f()\nf()", status=("user_error",), contains=("RecursionError",)),
    Case(
        "python",
        "a repr without end",
        "x = []\nfor _ in range(100000):\n    x = [x]\nx",
        status=("user_error", "oom"),
        contains=("RecursionError",),
    ),
    Case(
        "python",
        "finalisers at the end",
        """
import sys, gc
class X:
    def __del__(self):
        raise SystemExit(9)
x = X()
x.y = x
print('ended')
""",
        stdout="ended\n",
    ),
]
