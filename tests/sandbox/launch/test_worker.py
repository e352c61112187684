"""Code that launchers share: workers of a dead owner are found and removed, those of a live owner stay."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from retool_jax.sandbox import Limits, SandboxConfig, open_sandbox
from retool_jax.sandbox.launch import bubblewrap, cgroup, process
from retool_jax.sandbox.launch.procfs import (
    family,
    owner_is_gone,
    owner_tag,
    proportional_mb,
    stale_workers,
    started_at,
)
from retool_jax.sandbox.launch.worker import start

from ..processes import kill
from ..programs import SLEEP, until

# Starts a worker, stops all its processes, so that they cannot notice the end of their input, and waits to be killed.
OWNER = """
import asyncio, json, os, signal, sys, time
from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch import bubblewrap, process
from retool_jax.sandbox.launch.procfs import family


async def main():
    worker = await {"process": process, "bubblewrap": bubblewrap}[sys.argv[1]].launch(SandboxConfig(), 64)
    await worker.reader.readexactly(100)
    pids = family(worker.pid)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    print(json.dumps(pids), flush=True)
    time.sleep(60)

asyncio.run(main())
"""


@pytest.mark.alone  # every sandbox that opens sweeps
@pytest.mark.parametrize("launcher", [process, bubblewrap], ids=["process", "bubblewrap"])
def test_workers_of_a_dead_owner_are_swept_and_those_of_a_live_one_are_not(launcher):
    if reason := launcher.missing(SandboxConfig()):
        pytest.skip(reason)
    name = launcher.__name__.rpartition(".")[2]
    with subprocess.Popen([sys.executable, "-c", OWNER, name], stdout=subprocess.PIPE) as owner:
        pids = json.loads(owner.stdout.readline())
        tag = f"retool-{owner.pid}-{started_at(owner.pid)}"
        assert not owner_is_gone(tag)
        assert not set(stale_workers()) & set(pids)
        owner.kill()
    deadline = time.monotonic() + 30
    while not owner_is_gone(tag) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert asyncio.run(launcher.sweep_stale()) > 0
    assert [pid for pid in pids if started_at(pid) is not None] == []
    assert tag not in cgroup.owners()
    assert not list(Path("/tmp").glob(f"sandbox-{tag}*"))


def test_an_owner_is_known_by_more_than_its_number():
    pid, start = os.getpid(), started_at(os.getpid())
    assert owner_tag() == f"retool-{pid}-{start}"
    assert not owner_is_gone(f"retool-{pid}-{start}")
    assert owner_is_gone(f"retool-{pid}-{start + 1}")
    assert not owner_is_gone("something else")


@pytest.mark.skipif(cgroup.memory_folder() is None, reason="no memory control group can be made here")
def test_a_memory_group_holds_its_limit_and_says_so():
    async def main() -> tuple[int, int, float | None]:
        group = cgroup.WorkerGroup(owner_tag(), 32)
        try:
            assert group.oom_kills() == 0
            code = "import sys; open(sys.argv[1], 'w').write('0'); x = bytearray(64 << 20); print(len(x))"
            entrance = str(group.entrances[0])
            done = await asyncio.create_subprocess_exec(sys.executable, "-I", "-S", "-c", code, entrance)
            return await done.wait(), group.oom_kills(), group.usage_mb()
        finally:
            await group.remove()
            assert not group.path.exists()

    code, kills, usage = asyncio.run(main())
    assert (code, kills) == (-signal.SIGKILL, 1)
    assert usage is None or usage < 32


@pytest.mark.skipif(cgroup.cpu_folder() is None, reason="no version 1 group for processor time can be made here")
def test_a_group_has_the_time_of_one_core_and_leaves_nothing():
    async def main() -> list[Path]:
        group = cgroup.WorkerGroup(owner_tag(), 32)
        memory, cpu = (entrance.parent for entrance in group.entrances)
        assert group.folders == [memory, memory.parent, cpu, cpu.parent]
        assert (cpu / "cpu.cfs_quota_us").read_text() == (cpu / "cpu.cfs_period_us").read_text()
        await group.remove()
        return group.folders

    assert not any(folder.exists() for folder in asyncio.run(main()))


@pytest.mark.parametrize("unified", [True, False])
def test_a_quota_below_what_the_cores_have_is_seen(unified: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def allow(folder: Path, quota: str) -> None:
        if unified:
            (folder / "cpu.max").write_text(f"{quota} 1000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (folder / "cpu.cfs_period_us").write_text("1000\n")

    own = tmp_path / "pod" / "container"
    own.mkdir(parents=True)
    monkeypatch.setattr(cgroup, "_hierarchies", lambda _: [(tmp_path, own, unified)])
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    for quota, seen in (("max" if unified else "-1", False), ("3000", False), ("2999", True)):
        allow(own.parent, quota)
        assert cgroup.has_processor_quota() is seen


def test_a_start_can_be_cancelled_between_the_fork_and_the_pipes(tmp_path: Path):
    """On a busy machine the child may have its own children by then, which keep its pipes open after its death."""
    told = tmp_path / "pid"
    command = ["/bin/sh", "-c", f"sleep 60 & echo $! > {told}.part; mv {told}.part {told}; exec sleep 60"]

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def main() -> bool:
        before, files = set(family(os.getpid())), open_files()
        task = asyncio.create_task(start(command))
        while set(family(os.getpid())) <= before:
            await asyncio.sleep(0)
        while not told.exists():
            time.sleep(0.01)  # the loop is blocked, so that no pipe is connected
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=30)
        kill(int(told.read_text()))
        await until(lambda: open_files() <= files)  # no transport may be left until the loop ends
        return bool(done)

    assert asyncio.run(main()), "it waits for pipes that the child's child holds"


@pytest.mark.skipif(cgroup.memory_folder() is None, reason="no memory control group can be made here")
def test_a_busy_worker_that_lost_a_process_of_its_own_was_killed_from_outside():
    """gVisor's kernel may spin when a process that lent it memory is gone, and no program can end that process."""

    async def main() -> list[str]:
        command = ["/bin/sh", "-c", "sleep 60 & while :; do :; done"]
        worker = await start(command, group=cgroup.WorkerGroup(owner_tag(), 64))
        try:
            await until(lambda: len(worker.processes()) == 2)
            worker.note_machinery()
            found = [await worker.why_hung()]
            kill(*(pid for pid in worker.processes() if pid != worker.pid))
            await until(lambda: len(worker.processes()) == 1)
            return [*found, await worker.why_hung()]
        finally:
            await worker.stop()

    assert asyncio.run(main()) == ["overrun", "killed"]


def test_children_of_every_thread_belong_to_the_family():
    code = """if True:
        import subprocess, threading
        def start():
            child = subprocess.Popen(["sleep", "60"])
            print(child.pid, flush=True)
            child.wait()
        threading.Thread(target=start).start()
    """
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        found = family(parent.pid)
        os.kill(child, signal.SIGKILL)
    assert found == [parent.pid, child]


def test_memory_of_a_worker_is_known(worker_pids):
    async def main() -> tuple[float, float]:
        async with open_sandbox(SandboxConfig(("process",), slots=1)) as box:
            before = sum(map(proportional_mb, worker_pids(box)))
            call = asyncio.create_task(box.run(f"x = b'x' * (50 << 20)\n{SLEEP}", limits=Limits(wall_s=60)))
            during = before
            async with asyncio.timeout(30):
                while during - before < 45:
                    await asyncio.sleep(0.05)
                    during = sum(map(proportional_mb, worker_pids(box)))
            call.cancel()
            await asyncio.wait([call])
            return before, during

    before, during = asyncio.run(main())
    assert 5 < before < 60
    assert during - before < 80
