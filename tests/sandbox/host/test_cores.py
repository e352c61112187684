"""Which core a worker gets, and where the kernel then runs its threads."""

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from retool_jax.sandbox import SandboxConfig, open_sandbox
from retool_jax.sandbox.host.cores import Cores

MACHINE = {90002, 90003, 90005, 90007}  # no machine has them, so no other sandbox holds them


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores and no quota, whatever this machine has."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(MACHINE))
    monkeypatch.setattr("retool_jax.sandbox.host.cores.has_processor_quota", lambda: False)


def test_workers_are_spread_over_as_many_cores_as_asked_for(machine: None):
    cores = Cores(2)
    try:
        placed = [cores.assign() for _ in range(5)]
        assert sorted(Counter(placed).values()) == [2, 3]
        assert set(placed) < MACHINE
        cores.leave(placed[0])
        cores.leave(placed[0])
        assert cores.assign() == placed[0]
        assert cores.among(placed[0]) == {placed[0]} and cores.among(None) == MACHINE
    finally:
        cores.close()


def test_no_two_sandboxes_have_the_same_core(machine: None):
    first, second, third = Cores(3), Cores(3), Cores(1)
    try:
        ours, theirs = {first.assign() for _ in range(3)}, {second.assign() for _ in range(3)}
        assert len(ours) == 3 and len(theirs) == 1 and not ours & theirs
        assert third.assign() is None
        assert third.best(None, Counter()) is None
        first.close()
        late = Cores(4)
        assert {late.assign() for _ in range(4)} == ours
        late.close()
    finally:
        for cores in (first, second, third):
            cores.close()


def test_a_share_of_all_cores_is_no_core(machine: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("retool_jax.sandbox.host.cores.has_processor_quota", lambda: True)
    cores = Cores(2)
    assert cores.assign() is None
    cores.leave(None)
    cores.close()


def test_a_worker_goes_where_least_is_done_and_stays_where_it_is_as_good(machine: None):
    cores = Cores(2)
    try:
        here, there = cores.assign(), cores.assign()
        assert cores.best(here, Counter()) == here
        assert cores.best(here, Counter({here: 1, there: 1})) == here
        assert cores.best(here, Counter({here: 1})) == there
    finally:
        cores.close()


def test_all_threads_of_a_worker_run_on_its_core(backend: str, descendants):
    async def main() -> list[tuple[int | None, set[frozenset[int]]]]:
        async with open_sandbox(SandboxConfig(backend=(backend,), slots=1, probe_s=0)) as box:
            await box.run("import numpy")
            members = []
            while len(members) < 2:
                await asyncio.sleep(0.05)
                members = list(box.crew._ready)
            return [(member.core, affinities(member.launched.pid)) for member in members]

    def affinities(pid: int) -> set[frozenset[int]]:
        return {
            frozenset(os.sched_getaffinity(int(thread.name)))
            for process in {pid} | descendants(pid)
            for thread in Path(f"/proc/{process}/task").iterdir()
        }

    for core, found in asyncio.run(main()):
        assert found == {frozenset({core} if core is not None else os.sched_getaffinity(0))}
