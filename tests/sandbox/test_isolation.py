"""What a program must not reach or leave behind on the `process` back-end."""

import asyncio
import os
import socket
import subprocess
import time

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, ToolResult, open_sandbox


def run_one(code: str, limits: Limits | None = None) -> tuple[ToolResult, str]:
    async def main() -> tuple[ToolResult, str]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            return await box.run(code, limits=limits), box.description

    return asyncio.run(main())


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


def test_host_secrets_are_not_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOST_SECRET", "hunter2-canary")
    code = (
        "import glob, os\nprint(sorted(os.environ))\n"
        "for path in glob.glob('/proc/[0-9]*/environ'):\n"
        "    try:\n        print('hunter2-canary' in open(path).read())\n    except OSError:\n        pass"
    )
    result, _ = run_one(code)
    assert result.status == "success"
    assert "HOST_SECRET" not in result.stdout and "True" not in result.stdout
    assert "PATH" in result.stdout


def test_network_is_refused_where_the_description_says_so():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result, description = run_one(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)")
    if subprocess.run(["unshare", "--net", *(["--user"] if os.geteuid() else []), "true"], check=False).returncode:
        pytest.skip("this kernel grants no network namespace")
    assert "no network" in description.split("(")[0]
    assert result.status == "user_error"
    assert "OSError" in result.stderr or "refused" in result.stderr or "unreachable" in result.stderr


def test_description_says_that_it_is_unsafe():
    _, description = run_one("")
    assert description.startswith("process: rlimits") and "unsafe: host files are readable" in description


@pytest.mark.skipif(os.geteuid() != 0, reason="own user ids need root")
def test_programs_run_without_rights():
    code = (
        "import os\nprint(os.getuid() > 1000, os.getgroups())\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'NoNewPrivs'))])\n"
        "try:\n    os.kill(os.getppid(), 9)\nexcept PermissionError:\n    print('refused')"
    )
    result, _ = run_one(code)
    assert result.stdout == "True []\n0000000000000000 1\nrefused\n"


DAEMON = """
import os, sys, time
if os.fork() == 0:  # one that holds the pipes, in a session and a group of its own
    os.setsid()
    if os.fork() == 0:
        code = "import time; print('up', flush=True); time.sleep(300)"
        os.execv(sys.executable, [sys.executable, "-c", code, MARKER])
    os._exit(0)
time.sleep(0.5)
print("done")
"""


def test_background_process_neither_delays_the_answer_nor_survives():
    marker = f"retool-test-{os.getpid()}-{time.monotonic_ns()}"

    async def main() -> tuple[ToolResult, list[int], list[int]]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            call = asyncio.create_task(box.run(DAEMON.replace("MARKER", repr(marker))))
            await asyncio.sleep(0.3)
            during = processes_marked(marker)
            return await call, during, processes_marked(marker)

    result, during, after = asyncio.run(main())
    assert (result.status, result.stdout) == ("success", "up\ndone\n")
    assert result.wall_s < 5
    assert (len(during), after) == (1, [])


def test_fork_bomb_is_bounded_and_swept():
    code = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass"

    async def main() -> list[ToolResult]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            return [await box.run(code, limits=Limits(wall_s=0.5, processes=16)), await box.run("print(1)")]

    bomb, after = asyncio.run(main())
    assert bomb.status == "timeout"
    assert (after.status, after.stdout, after.attempts) == ("success", "1\n", 1)


def test_files_stay_within_their_limit():
    result, _ = run_one("with open('f', 'wb') as f:\n    f.write(bytes(2 << 20))", Limits(file_mb=1))
    assert result.status == "user_error"
    assert "OSError" in result.stderr


def test_a_tree_nested_thousands_deep_does_not_hurt():
    code = "import os\nfor _ in range(3000):\n    os.mkdir('d')\n    os.chdir('d')\nNone"

    async def main() -> list[ToolResult]:
        async with open_sandbox(SandboxConfig(slots=1)) as box:
            return [await box.run(code), await box.run("import os\nos.listdir('.')")]

    deep, after = asyncio.run(main())
    assert deep.status == "success"
    assert (after.stdout, after.attempts) == ("[]\n", 1)
