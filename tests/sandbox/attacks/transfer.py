"""Attacks through uploads and fetches."""

from collections.abc import Callable

from retool_jax.sandbox import ToolResult

from .case import ENDED, Case

MB = 1 << 20


def fetched(expected: dict[str, bytes]) -> Callable[[ToolResult], str]:
    """Complain unless exactly these files came back."""

    def check(result: ToolResult) -> str:
        have = {path: data[:50] for path, data in result.files.items()}
        return "" if result.files == expected else f"fetched {have}, not {sorted(expected)}"

    return check


def upload(name: str, path: str) -> Case:
    return Case("transfer", name, "print('ran')", files={path: b"planted"}, status=("rejected",), stdout="")


def asked(name: str, path: str) -> Case:
    return Case("transfer", name, "print('ran')", fetch=(path,), status=("rejected",), stdout="", check=fetched({}))


TRANSFER = [
    upload("up, one above", "../planted"),
    upload("up, above in the middle", "a/../../planted"),
    upload("up, absolute", "/tmp/planted"),
    upload("up, nothing", ""),
    upload("up, the folder itself", "."),
    upload("up, with NUL", "a\0b"),
    asked("down, one above", "../canary"),
    asked("down, above in the middle", "a/../../etc/passwd"),
    asked("down, absolute", "/etc/passwd"),
    asked("down, the environment", "/proc/self/environ"),
    Case("transfer", "up, a file too large", "print('ran')", files={"f": bytes(16 * MB + 1)}, status=("rejected",)),
    Case(
        "transfer",
        "up, too much in all",
        "print('ran')",
        files={f"f{i}": bytes(12 * MB) for i in range(3)},
        status=("rejected",),
    ),
    Case("transfer", "up, too long a name", "print('ran')", files={"x" * 5000: b"x"}, status=("rejected",)),
    Case(
        "transfer",
        "up, a file where a folder is needed",
        "print('ran')",
        files={"a": b"x", "a/b": b"y"},
        status=("rejected", "user_error"),
    ),
    Case(
        "transfer",
        "up and down in folders",
        "data = open('a/b/c', 'rb').read()\nopen('a/b/d', 'wb').write(data[::-1])",
        files={"a/b/c": b"abc", "ä ö": b""},
        fetch=("a/b/d", "a/b/c", "ä ö", "nowhere", "a/b/c/d"),
        check=fetched({"a/b/d": b"cba", "a/b/c": b"abc", "ä ö": b""}),
        stdout="3\n",
    ),
    Case(
        "transfer",
        "down, links to everywhere",
        """
import os
targets = "@CANARY@", "/etc/passwd", "/proc/self/environ", "/proc/1/environ", "f", "loop5", ".", "/dev/zero"
for number, target in enumerate(targets):
    os.symlink(target, f"loop{number}" if number == 5 else f"s{number}")
open("f", "w").write("f")
os.symlink("/etc", "etc")
os.symlink("/proc/1/root", "root")
os.symlink(".", "here")
""",
        fetch=(*(f"s{i}" for i in range(8)), "loop5", "etc/passwd", "root/etc/passwd", "here/f", "f"),
        check=fetched({"f": b"f"}),
    ),
    Case(
        "transfer",
        "down, what is no file",
        """
import os, socket
os.mkfifo("fifo")
os.mkdir("folder")
socket.socket(socket.AF_UNIX).bind("socket")
open("shut", "w").write("x")
os.chmod("shut", 0)
os.mkdir("closed")
open("closed/f", "w").write("x")
os.chmod("closed", 0)
""",
        fetch=("fifo", "folder", "socket", "folder/x", "."),
        status=("success", "rejected"),  # "." does not name a file
        check=fetched({}),
    ),
    Case(
        "transfer",
        "down, a fifo with nobody behind it",
        "import os\nos.mkfifo('fifo')",
        fetch=("fifo",),
        check=fetched({}),
    ),
    Case(
        "transfer",
        "down, a file too large",
        "open('f', 'wb').write(bytes(17 << 20))\nNone",
        fetch=("f",),
        status=ENDED,
        check=fetched({}),
    ),
    Case(
        "transfer",
        "down, a hole too large",
        "open('f', 'wb').truncate(60 << 20)\nNone",
        fetch=("f",),
        status=ENDED,
        check=fetched({}),
    ),
    Case(
        "transfer",
        "down, too much in all",
        "for i in range(4):\n    open(f'f{i}', 'wb').write(bytes(12 << 20))",
        fetch=("f0", "f1", "f2", "f3"),
        status=ENDED,
        check=lambda result: "" if sum(map(len, result.files.values())) <= 32 * MB else "more than 32 MiB came back",
        wall_s=10.0,
    ),
    Case(
        "transfer",
        "down, a path that changes while it is read",
        """
import os
open("f", "w").write("mine")
os.symlink("@CANARY@", "link")
if os.fork() == 0:
    os.setsid()
    while True:
        for source in ("link", "f"):
            try:
                os.link(source, "new", follow_symlinks=False)
                os.rename("new", "x")
            except OSError:
                pass
""",
        fetch=("x",),
        check=lambda result: "" if result.files.get("x", b"mine") == b"mine" else f"fetched {result.files}",
    ),
    Case(
        "transfer",
        "down, many folders deep",
        "import os\nfor _ in range(300):\n    os.mkdir('d')\n    os.chdir('d')\nopen('f', 'w').write('deep')\nNone",
        fetch=("d/" * 300 + "f",),
        check=lambda result: "" if result.files in ({"d/" * 300 + "f": b"deep"}, {}) else "another file came back",
    ),
    Case(
        "transfer",
        "down, kept although it failed",
        "open('f', 'w').write('kept')\n1 / 0",
        fetch=("f",),
        status=("user_error",),
        check=fetched({"f": b"kept"}),
    ),
    Case(
        "transfer",
        "down, kept although time ran out",
        "open('f', 'w').write('kept')\nwhile True:\n    pass",
        fetch=("f",),
        status=("timeout",),
        wall_s=1.0,
    ),
    Case(
        "transfer",
        "up, modules in place of the library's",
        "import json\nprint('ran')",
        files={"json.py": b"print('mine')"},
        status=ENDED,
        then=(("import json\nprint(json.dumps(1))", "1\n"),),
    ),
]
