"""The `gvisor` back-end: what a sandbox keeps from programs, and that nothing of a worker outlives it.

Everything of a worker carries its owner's pid and start time in its name, so what is left can be looked for from
outside: processes, folders, control groups, mounts.
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

import retool_jax
from retool_jax.sandbox import Limits, SandboxConfig, ToolResult
from retool_jax.sandbox.host.member import Member
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.launch import cgroup, gvisor, keeper
from retool_jax.sandbox.launch.procfs import owner_tag, started_at

CONFIG = SandboxConfig()
GONE_S = 30.0
REASON = gvisor.missing(CONFIG)

needs_runsc = pytest.mark.skipif(bool(REASON), reason=REASON)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
needs_cgroup = pytest.mark.skipif(cgroup.memory_folder() is None, reason="no memory control group can be made here")


def commands() -> dict[int, str]:
    """The command lines of all live processes."""
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            found[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
    return found


def traces(tag: str) -> list[str]:
    """All that is left of an owner's workers on this machine."""
    processes = [f"{pid} {command}" for pid, command in commands().items() if f"{tag}-" in command]
    groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if f"{tag}-" in path]
    base = gvisor.base_folder()
    folders = [str(path) for path in (base.iterdir() if base.is_dir() else ()) if path.name.startswith(f"{tag}-")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if f"{tag}-" in line]
    return processes + groups + folders + mounts


def wait_until_gone(tag: str) -> list[str]:
    """What is left of an owner's workers after some time to end."""
    deadline = time.monotonic() + GONE_S
    while (left := traces(tag)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def part_of(member: Member, role: str) -> int:
    """The process with a role in a worker: runner, sentry or gofer."""
    folder = next(gvisor.base_folder().glob(f"{owner_tag()}-*"))
    sandbox, watchers = keeper.processes(folder)
    if role == "runner":
        return next(pid for pid in watchers if pid == member.launched.pid)
    name = {"sentry": "runsc-sandbox", "gofer": "runsc-gofer"}[role]
    return next(pid for pid in sandbox if commands().get(pid, "").startswith(name))


async def start(memory_mb: int = 256) -> tuple[Member, dict]:
    """A started worker, and its first frame."""
    member = Member(await gvisor.launch(CONFIG, memory_mb), memory_mb)
    return member, await member.exchange(b"", 60)


def with_worker(use: Callable[[Member], Awaitable[object]]) -> None:
    """Run `use` on a new worker; nothing of the worker may be left afterwards."""

    async def main() -> None:
        member, _ = await start()
        try:
            await use(member)
        finally:
            async with asyncio.timeout(30):
                await member.launched.stop()

    asyncio.run(main())
    assert traces(owner_tag()) == []


async def run(member: Member, code: str, limits: Limits | None = None) -> ToolResult:
    result, _ = await member.perform(Request(code, limits=limits or Limits(memory_mb=256)))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------------------------------------------------


@needs_runsc
def test_programs_run_and_the_worker_says_what_it_is():
    async def main() -> None:
        member, hello = await start()
        try:
            assert (await run(member, "print(2 + 2)")).stdout == "4\n"
            assert (await run(member, "import os\nprint(os.uname().release, os.getuid() > 0)")).stdout == "4.4.0 True\n"
            assert member.launched.memory_mb() > 10
        finally:
            await member.launched.stop()
            await member.launched.stop()
        assert hello["isolation"]["files"] and hello["isolation"]["network"] and hello["isolation"]["own_uid"]
        assert re.match(r"gvisor: runsc \S+ on (systrap|ptrace), ", gvisor.describe(hello["isolation"]))

    asyncio.run(main())
    assert traces(owner_tag()) == []


@needs_runsc
def test_files_of_the_host_cannot_be_read_or_made(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("canary-3141")
    users = Path("/etc/passwd").read_text()
    code = f"""
import glob, os
seen = []
for path in ({str(secret)!r}, "/proc/1/root{secret}", "/etc/passwd", "/etc/shadow", *glob.glob("/proc/*/environ")):
    try:
        seen.append(open(path, errors="replace").read())
    except OSError:
        pass
print(any(part in text for text in seen for part in ("canary-3141", "PYTEST", {users!r})))
for path in ("/made", "/usr/made", "/inside/made", "/proc/made"):
    try:
        open(path, "w")
        print("made", path)
    except OSError:
        pass
print(sorted(set(os.listdir("/")) & {{"boot", "home", "mnt", "run", "srv", "work"}}))
"""

    async def use(member: Member) -> None:
        assert (await run(member, code)).stdout == "False\n[]\n"

    with_worker(use)


@needs_runsc
def test_sockets_of_the_host_cannot_be_reached():
    name = f"\0retool-test-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(name)
        unix.listen()
        code = f"""
import socket
for kind, address in ((socket.AF_INET, ("127.0.0.1", {tcp.getsockname()[1]})), (socket.AF_UNIX, {name!r})):
    with socket.socket(kind) as client:
        client.settimeout(2)
        try:
            client.connect(address)
            print("reached", address)
        except OSError:
            print("refused")
"""

        async def use(member: Member) -> None:
            assert (await run(member, code)).stdout == "refused\nrefused\n"

        with_worker(use)


CROWD = """
import os, time
for _ in range(12):
    if os.fork() == 0:
        block = bytearray(200 << 20)
        time.sleep(20)
        os._exit(0)
time.sleep(20)
"""


@needs_runsc
@needs_cgroup
def test_memory_of_all_processes_together_is_bounded_and_told_from_other_deaths():
    async def use(member: Member) -> None:
        assert not member.launched.ran_out_of_memory()
        with pytest.raises(Exception, match="died"):
            await run(member, CROWD, Limits(memory_mb=256, wall_s=30))
        assert member.launched.ran_out_of_memory()

    with_worker(use)


@needs_runsc
def test_a_worker_begins_on_two_cores_of_many(monkeypatch: pytest.MonkeyPatch):
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cores | {8000, 8001, 8002})
    command = gvisor.two_cores()
    assert command[:-1] == [shutil.which("taskset"), "--cpu-list"]
    assert len(set(map(int, command[-1].split(","))) & (cores | {8000, 8001, 8002})) == 2
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    assert gvisor.two_cores() == []
    monkeypatch.setattr(gvisor, "two_cores", lambda: [*command[:-1], ",".join(map(str, sorted(cores)[:2]))])

    async def use(member: Member) -> None:
        assert (await run(member, "print(2 + 2)")).stdout == "4\n"

    with_worker(use)


# ---------------------------------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------------------------------


@needs_runsc
@pytest.mark.parametrize("role", ["sentry", "gofer", "runner"])
def test_a_killed_part_ends_the_worker_and_nothing_is_left(role: str):
    async def use(member: Member) -> None:
        os.kill(part_of(member, role), signal.SIGKILL)
        async with asyncio.timeout(30):  # long before any time limit of a program
            assert await member.launched.reader.read() == b""
        assert not member.launched.ran_out_of_memory()

    with_worker(use)


@needs_runsc
@pytest.mark.parametrize("role", ["sentry", "gofer", "runner"])
def test_a_stopped_part_cannot_hold_up_the_end(role: str):
    async def use(member: Member) -> None:
        os.kill(part_of(member, role), signal.SIGSTOP)

    with_worker(use)


@needs_runsc
def test_a_dead_keeper_is_replaced():
    async def use(member: Member) -> None:
        folder = next(gvisor.base_folder().glob(f"{owner_tag()}-*"))
        waiting = [pid for pid, command in commands().items() if "keeper" in command and str(folder) in command]
        assert len(waiting) == 1
        os.kill(waiting[0], signal.SIGKILL)

    with_worker(use)


@needs_runsc
def test_a_worker_that_does_not_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    build = gvisor.probe()
    monkeypatch.setattr(gvisor, "probe", lambda: build._replace(flags=("--platform=abacus",)))

    async def main() -> str:
        launched = await gvisor.launch(CONFIG, 256)
        assert await launched.reader.read() == b""
        words = await launched.last_words()
        await launched.stop()
        return words

    assert "abacus" in asyncio.run(main())
    assert traces(owner_tag()) == []


@needs_runsc
def test_a_start_that_is_cancelled_before_its_keeper_is_there_leaves_nothing():
    async def main() -> None:
        starting = asyncio.create_task(gvisor.launch(CONFIG, 256))
        while not traces(owner_tag()):
            await asyncio.sleep(0)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(main())
    assert wait_until_gone(owner_tag()) == []


@needs_runsc
def test_a_start_without_a_keeper_leaves_nothing(monkeypatch: pytest.MonkeyPatch):
    async def fork(*_: object, **__: object) -> None:
        raise BlockingIOError("no more processes")

    monkeypatch.setattr(asyncio, "create_subprocess_exec", fork)
    with pytest.raises(BlockingIOError, match="no more processes"):
        asyncio.run(gvisor.launch(CONFIG, 256))
    assert traces(owner_tag()) == []


# A separate program, so that it can be killed: it starts a worker, treats it as its arguments say, then waits.
OWNER = """
import asyncio, os, signal, sys
from pathlib import Path
from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch import gvisor, keeper
from retool_jax.sandbox.host.member import Member
from retool_jax.sandbox.host.request import Request
from retool_jax.sandbox.launch.procfs import owner_tag

async def main(mode):
    member = Member(await gvisor.launch(SandboxConfig(), 256), 256)
    await member.exchange(b"", 60)
    folder = next(gvisor.base_folder().glob(owner_tag() + "-*"))
    if mode != "busy":
        for pid in keeper.processes(folder)[0]:
            os.kill(pid, signal.SIGSTOP)
    if mode in ("orphaned", "all stopped"):
        for name in filter(str.isdecimal, os.listdir("/proc")):
            try:
                command = Path(f"/proc/{name}/cmdline").read_bytes().decode(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            if "keeper" in command and str(folder) in command:
                os.kill(int(name), signal.SIGKILL if mode == "orphaned" else signal.SIGSTOP)
    print("ready", flush=True)
    await member.perform(Request("while True: pass"))

asyncio.run(main(sys.argv[1]))
"""


def kill_owner(mode: str) -> str:
    """Start an owner, wait for its worker, kill it; returns its tag."""
    environment = os.environ | {"PYTHONPATH": str(Path(retool_jax.__file__).parents[1])}
    command = [sys.executable, "-c", OWNER, mode]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, cwd="/", text=True) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "ready\n"
        tag = f"retool-{owner.pid}-{started_at(owner.pid)}"
        assert traces(tag)
        time.sleep(0.2)  # until the program runs
        owner.kill()
    return tag


@needs_runsc
@pytest.mark.parametrize("mode", ["busy", "stopped"])
def test_nothing_outlives_an_owner_that_is_killed(mode: str):
    assert wait_until_gone(kill_owner(mode)) == []


@needs_runsc
@pytest.mark.alone  # every sandbox that opens sweeps
@pytest.mark.parametrize("mode", ["orphaned", "all stopped"])
def test_a_sweep_removes_what_dead_owners_left_and_spares_the_living(mode: str):
    async def use(member: Member) -> None:
        tag = await asyncio.to_thread(kill_owner, mode)
        assert any("runsc-sandbox" in trace for trace in traces(tag))
        assert await gvisor.sweep_stale() >= 1
        assert traces(tag) == []
        assert (await run(member, "print('alive')")).stdout == "alive\n"

    with_worker(use)


# ---------------------------------------------------------------------------------------------------------------------
# Machines
# ---------------------------------------------------------------------------------------------------------------------

AS_NOBODY = """
import asyncio, os
os.setgroups([])
os.setgid(64123)
os.setuid(64123)
from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch import gvisor
from retool_jax.sandbox.host.member import Member
from retool_jax.sandbox.host.request import Request

async def main():
    member = Member(await gvisor.launch(SandboxConfig(), 256), 256)
    try:
        hello = await member.exchange(b"", 60)
        result, _ = await member.perform(Request("import os; print(os.getuid() > 0, os.listdir('/tmp'))"))
        print(gvisor.describe(hello["isolation"]))
        print(result.status, result.stdout)
    finally:
        await member.launched.stop()
    print(gvisor.base_folder().exists())

asyncio.run(main())
"""


@needs_runsc
@needs_root
def test_an_ordinary_user_can_have_it_too():
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    probe = "import sys; print(sys.version_info >= (3, 11))"
    found = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False) if python else None
    if found is None or found.stdout != "True\n":
        pytest.skip("no Python 3.11 that other users can run")
    with tempfile.TemporaryDirectory() as folder:  # other users may be unable to read this checkout
        os.chmod(folder, 0o755)
        shutil.copytree(Path(retool_jax.__file__).parent, Path(folder, "retool_jax"))
        environment = {"PYTHONPATH": folder, "PATH": os.environ["PATH"], "HOME": "/nonexistent"}
        command = [python, "-c", AS_NOBODY]
        done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False)
    description, answer, *_, left = done.stdout.splitlines() or [done.stderr] * 3
    assert "memory bounded per process only" in description
    assert (answer, left) == ("success True []", "False")


def fake_runsc(folder: Path, platforms: str, flags: str) -> None:
    script = folder / "runsc"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$1" in help) printf "{platforms}" ;; flags) printf "{flags}" ;; *) echo runsc version x-1 ;; esac\n'
    )
    script.chmod(0o755)


@pytest.fixture
def path_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A PATH that holds only what the test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path))
    gvisor.probe.cache_clear()
    yield tmp_path
    gvisor.probe.cache_clear()


def test_a_machine_without_runsc_is_told_the_one_line(path_of_its_own: Path):
    assert "apt-get install runsc" in gvisor.missing(CONFIG)


def test_systrap_is_preferred_and_kvm_never_used(path_of_its_own: Path):
    fake_runsc(path_of_its_own, r"kvm\nptrace\nsystrap\n", r"  -overlay2 string\n\tset\n  -root string\n")
    build = gvisor.probe()
    assert (build.version, build.platform) == ("x-1", "systrap")
    assert build.flags == ("--platform=systrap", "--overlay2=none")
    gvisor.probe.cache_clear()
    fake_runsc(path_of_its_own, r"kvm\nptrace\n", "")
    assert gvisor.probe().flags == ("--platform=ptrace",)
    gvisor.probe.cache_clear()
    fake_runsc(path_of_its_own, r"kvm\n", "")
    assert "'kvm'" in gvisor.missing(CONFIG) and "ptrace" in gvisor.missing(CONFIG)
