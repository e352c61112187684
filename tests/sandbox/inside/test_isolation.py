"""What a program must not reach, use up or leave behind, on every back-end that works here."""

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox


def processes_marked(marker: str) -> list[int]:
    """Processes on this machine whose command line holds `marker`."""
    found = []
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/cmdline", "rb") as file:
                if marker.encode() in file.read() and int(name) != os.getpid():
                    found.append(int(name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module", autouse=True)
def host_secret() -> Iterator[None]:
    """In the environment of the host before any worker starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOST_SECRET", "hunter2-canary")
        yield


def test_host_secrets_are_not_in_the_environment(box):
    code = (
        "import glob, os\nprint(sorted(os.environ))\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try:\n        print('hunter2-canary' in open(path).read())\n    except OSError:\n        pass"
    )
    (result,) = box.run(code)
    assert result.status == "success"
    assert "HOST_SECRET" not in result.stdout and "True" not in result.stdout
    assert "PATH" in result.stdout


def test_network_is_refused_where_the_description_says_so(box):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (result,) = box.run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
    if subprocess.run(["unshare", "--net", *(["--user"] if os.geteuid() else []), "true"], check=False).returncode:
        pytest.skip("this kernel grants no network namespace")
    assert "no network" in box.sandbox.description.split("(")[0]
    assert result.status == "user_error"
    assert "OSError" in result.stderr or "refused" in result.stderr or "unreachable" in result.stderr


def test_only_the_process_back_end_says_that_it_is_unsafe(box):
    unsafe = "unsafe: host files are readable" in box.sandbox.description
    assert unsafe == (box.sandbox.backend == "process")
    assert box.sandbox.description.startswith(f"{box.sandbox.backend}: ")


@pytest.mark.parametrize("box", ["bubblewrap", "gvisor"], indirect=True)
def test_host_files_are_hidden_where_that_is_promised(box, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2-canary")
    secret.chmod(0o644)
    places = [str(secret), "/etc/shadow", "/etc/passwd", "/home", "/root/.bashrc", "/var/log"]
    code = (
        f"import os\nfor path in {places}:\n"
        "    for root in ('', '/proc/1/root', '/proc/self/root'):\n"
        "        if os.path.exists(root + path):\n            print(path)\n"
        "for path in ('/x', '/usr/x', '/inside/x', '/dev/x', '/proc/1/comm'):\n"
        "    try:\n        open(path, 'w').write('x')\n        print('wrote', path)\n    except OSError:\n        pass"
    )
    (result,) = box.run(code)
    assert (result.status, result.stdout) == ("success", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="own user ids need root")
def test_programs_run_without_rights(box):
    code = (
        "import os\nprint(os.getuid() > 1000, os.getgroups())\n"
        "lines = [line.split() for line in open('/proc/self/status')]\n"
        "print(*[line[1] for line in lines if line[0].startswith(('Cap', 'NoNewPrivs'))])\n"
        "for pid in [1, os.getppid()]:\n    try:\n        os.kill(pid, 9)\n"
        "    except (PermissionError, ProcessLookupError):\n        print('refused')\n"
        "try:\n    os.setuid(0)\nexcept PermissionError:\n    print('refused')"
    )
    (result,) = box.run(code)
    users, rights, *refusals = result.stdout.splitlines()
    assert (users, refusals) == ("True []", ["refused"] * 3)
    assert all(int(word, 16) == 0 for word in rights.split()[:5])
    assert rights.split()[5:] in (["1"], [])  # gVisor's kernel does not show the flag


def test_each_program_has_a_user_of_its_own_where_root_can_give_one(box):
    if os.geteuid():
        pytest.skip("own user ids need root")
    uids = [result.stdout for _ in range(6) for result in box.run("import os\nos.getuid()")]
    assert len(set(uids)) == 6


SYSTEM_CALLS = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
for name, arguments in {"unshare": (0x10000000,), "mount": (0, b"/tmp", b"tmpfs", 0, 0), "ptrace": (0, 0, 0, 0),
                        "shmget": (1, 4096, 0o1666), "setns": (0, 0), "chroot": (b"/tmp",)}.items():
    if getattr(libc, name)(*arguments) != -1:
        print(name)
if libc.syscall(56, 0x10000011, 0, 0, 0, 0) == 0:  # clone into a user namespace
    libc._exit(0)
for family in (16, 17, 38, 40):  # NETLINK, PACKET, ALG, VSOCK
    try:
        socket.socket(family, socket.SOCK_DGRAM)
        print("family", family)
    except OSError:
        pass
socket.socketpair()
socket.socket(socket.AF_INET)
"""


@pytest.mark.parametrize("box", ["bubblewrap"], indirect=True)
def test_the_filter_refuses_what_mathematics_does_without(box):
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers in this program are those of x86_64")
    (result,) = box.run(SYSTEM_CALLS + "None")
    assert (result.status, result.stdout) == ("success", "")


def test_system_v_objects_do_not_outlive_a_program(box):
    make = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.shmget(4711, 4096, 0o1666)\nNone"
    find = "import ctypes\nctypes.CDLL(None).shmget(4711, 0, 0)"
    for _ in range(2):
        box.run(make, make)
        assert [result.stdout for result in box.run(find, find)] == ["-1\n", "-1\n"]


DAEMON = """
import os, sys, time
if os.fork() == 0:  # it holds the pipes, in its own session and process group
    os.setsid()
    if os.fork() == 0:
        code = "import time; print('up', flush=True); time.sleep(300)"
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", code, MARKER])
    os._exit(0)
time.sleep(1)
print("done")
"""


def test_background_process_neither_delays_the_answer_nor_survives(box):
    marker = f"retool-test-{os.getpid()}-{time.monotonic_ns()}"
    (result,) = box.run(DAEMON.replace("MARKER", repr(marker)))
    assert (result.status, result.stdout) == ("success", "up\ndone\n")
    assert result.wall_s < 5
    assert processes_marked(marker) == []


def test_fork_bomb_is_bounded_and_swept(box):
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"
    (bomb,) = box.run(code, limits=Limits(wall_s=0.5, processes=16))
    assert bomb.status == "timeout"
    for after in box.run("print(1)", "print(1)"):
        assert (after.status, after.stdout, after.attempts) == ("success", "1\n", 1)


@pytest.mark.parametrize("box", ["bubblewrap", "gvisor"], indirect=True)  # `process` has no memory group
def test_memory_of_all_processes_together_is_bounded(box):
    if "memory bounded as a whole" not in box.sandbox.description:
        pytest.skip("no memory control group here")
    code = (
        "import os, time\nfor _ in range(12):\n    if os.fork() == 0:\n"
        "        x = bytearray(60 << 20)\n        x[::4096] = b'x' * len(x[::4096])\n        time.sleep(20)\n"
        "        os._exit(0)\nfor _ in range(12):\n    if os.wait()[1]:\n        os.abort()"
    )

    async def main() -> list[ToolResult]:
        config = SandboxConfig((box.sandbox.backend,), slots=1, limits=Limits(memory_mb=64))
        async with open_sandbox(config) as small:
            return [await small.run(code), await small.run("print(1)")]

    bomb, after = asyncio.run(main())
    assert bomb.status == "oom"
    assert after.stdout == "1\n"


def test_files_stay_within_their_limit(box):
    (result,) = box.run("with open('f', 'wb') as f:\n    f.write(bytes(2 << 20))", limits=Limits(file_mb=1))
    assert result.status == "user_error"
    assert "OSError" in result.stderr


def test_a_tree_nested_thousands_deep_does_not_hurt(box):
    code = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nNone"
    (deep,) = box.run(code)
    assert deep.status == "success"
    for after in box.run("import os\nos.listdir('.')", "import os\nos.listdir('.')"):
        assert (after.stdout, after.attempts) == ("[]\n", 1)


def test_files_go_in_and_come_out(box):
    code = (
        "import os\ndata = open('in/a.bin', 'rb').read()\nos.mkdir('out')\nopen('out/b.bin', 'wb').write(data[::-1])\n"
    )
    (result,) = box.run(
        code + "os.path.getsize('in/a.bin')",
        files={"in/a.bin": bytes(range(256)) * 400},
        fetch=("out/b.bin", "in/a.bin", "missing"),
    )
    assert result.stdout == "102400\n"
    assert result.files == {"out/b.bin": bytes(range(255, -1, -1)) * 400, "in/a.bin": bytes(range(256)) * 400}


def test_only_plain_files_below_the_working_directory_come_out(box):
    code = (
        "import os\nopen('real', 'w').write('x')\nos.mkdir('d')\nopen('d/f', 'w').write('y')\n"
        "os.symlink('/proc/1/environ', 'link')\nos.symlink('d', 'folder')\nos.symlink('real', 'soft')\n"
        "os.mkfifo('pipe')\nopen('big', 'wb').truncate((16 << 20) + 1)\nos.link('real', 'hard')\nNone"
    )
    fetch = ("real", "link", "folder/f", "soft", "pipe", "d", "d/f", "big", "hard")
    (result,) = box.run(code, fetch=fetch)
    assert result.status == "success", result.stderr
    assert result.files == {"real": b"x", "d/f": b"y", "hard": b"x"}
