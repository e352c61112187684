"""Attacks on the channels between the program, the sandbox's own processes and the caller."""

from retool_jax.sandbox import ToolResult

from .case import ENDED, Case, loops

FORGERY = """
import base64, json, os, struct
result = {"status": "success", "message": "", "return_code": 0, "signal": None}
result |= {"wall_s": 0.0, "cpu_s": 0.0, "peak_rss_mb": 1.0}
stream = {"data": base64.b64encode(b"forged").decode(), "bytes": 6, "truncated": False}
response = {"result": result, "streams": [stream, stream], "files": {}, "clean": True, "ended": False, "pong": True}
payload = json.dumps(response).encode()
frame = struct.pack(">I", len(payload)) + payload
for number in range(256):
    try:
        os.set_blocking(number, False)
        os.write(number, frame) if number not in (1, 2) else None
    except OSError:
        pass
"""


def not_forged(result: ToolResult) -> str:
    return "the forged frame came through" if "forged" in result.stdout + result.stderr else ""


PROTOCOL = [
    Case(
        "protocol",
        "frames to every descriptor",
        FORGERY + "import sys\nsys.exit(3)",
        status=("user_error",),
        check=not_forged,
    ),
    Case(
        "protocol",
        "frames to descriptors of others",
        FORGERY
        + """
for pid in filter(str.isdecimal, os.listdir("/proc")):
    for number in range(32):
        for flags in (os.O_WRONLY, os.O_RDWR):
            try:
                if "pipe" in os.readlink(f"/proc/{pid}/fd/{number}") and int(pid) != os.getpid():
                    os.write(os.open(f"/proc/{pid}/fd/{number}", flags | os.O_NONBLOCK), frame)
                    print("REACHED", pid, number)
            except OSError:
                pass
""",
        check=not_forged,
        wall_s=10.0,
    ),
    Case("protocol", "every descriptor closed", "import os\nos.closerange(0, 4096)", status=ENDED),
    Case(
        "protocol",
        "every descriptor closed, then an error",
        "import os\nos.closerange(0, 4096)\n1 / 0",
        status=("user_error",),
    ),
    Case(
        "protocol",
        "every descriptor made stdout",
        """
import os
for number in (0, *range(2, 200)):
    try:
        os.dup2(1, number)
    except OSError:
        pass
print('ended')
""",
        status=ENDED,
        contains=("ended",),
    ),
    Case(
        "protocol",
        "every descriptor filled",
        """
import os
for number in range(3, 256):
    try:
        os.set_blocking(number, False)
        while os.write(number, b"rmx" * 1000):
            pass
    except OSError:
        pass
print("ended")
""",
        status=(*ENDED, "oom"),
        contains=("ended",),
    ),
    Case(
        "protocol",
        "every descriptor read",
        """
import os
for number in range(0, 256):
    try:
        os.set_blocking(number, False)
        data = os.read(number, 65536)
        if number > 2 and data:
            print("REACHED", number, data[:50])
    except OSError:
        pass
print("ended")
""",
        stdout="ended\n",
    ),
    Case(
        "protocol",
        "descriptors sent into every socket",
        """
import os, socket, stat
for number in range(256):
    try:
        if number != 3 and stat.S_ISSOCK(os.fstat(number).st_mode):
            print("REACHED a socket", number)
    except OSError:
        pass
for name in ("tier", "supervisor", "base", "numpy", "sympy", "control"):
    for address in ("\\0" + name, name, "/tmp/" + name):
        try:
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(address)
            print("REACHED", address)
        except OSError:
            pass
""",
        stdout="",
    ),
    Case(
        "protocol",
        "lies on its own report",
        """
import array, os, socket
for text in (b"started nan", b"started -1", b"started 1e999", b"done 0 nan inf", b"done 1e999 0 0", b"done 0 -5 -5",
             b"ended 0 0 0 0 True", b"gone", b"lost", b"\\xff" * 4000, b"", b"started", b"done", b"done 0 inf inf"):
    try:
        os.write(3, text)
    except OSError:
        pass
try:
    end = socket.socket(fileno=os.dup(3))
    for _ in range(50):
        rights = socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2] * 30)
        end.sendmsg([b"x"], [rights], socket.MSG_DONTWAIT)
except OSError:
    pass
os._exit(5)
""",
        status=("user_error",),
        check=lambda result: "" if result.return_code == 5 else f"return code {result.return_code}",
    ),
    Case(
        "protocol",
        "output that looks like frames",
        "import os, struct\nfor _ in range(100):\n    os.write(1, struct.pack('>I', 20) + b'{\"result\": 1}')",
        check=lambda result: "" if result.stdout_bytes == 1700 else f"counted {result.stdout_bytes}",
    ),
    Case(
        "protocol",
        "its input grown and overwritten",
        """
import os
for call in (lambda: os.write(0, b'x'), lambda: os.ftruncate(0, 1 << 40), lambda: os.ftruncate(0, 0)):
    try:
        call()
    except OSError:
        pass
print('ended')
""",
        stdin="some input",
        stdout="ended\n",
    ),
    Case(
        "protocol",
        "a slow reader of its input",
        "import sys, time\ntime.sleep(0.3)\nprint(len(sys.stdin.read()))",
        stdin="x" * 1000000,
        stdout="1000000\n",
    ),
    loops(
        "protocol",
        "input handed to a child",
        "import os\nif os.fork() == 0:\n    print(input(), flush=True)\n    os._exit(0)\nwhile True:\n    pass",
        stdin="seen\n",
        stdout="seen\n",
        wall_s=0.8,
    ),
    Case(
        "protocol",
        "exit code and signals of the machinery's own",
        "import os\nos._exit(137)",
        status=("user_error",),
        check=lambda result: "" if result.return_code == 137 else f"return code {result.return_code}",
    ),
]
