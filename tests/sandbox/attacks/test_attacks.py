"""Attacks on the sandbox and faults in it, judged from outside: `gvisor` and `bubblewrap` must stop every attack."""

import os
from collections.abc import Iterator

import pytest

from retool_jax.sandbox import SandboxConfig
from retool_jax.sandbox.launch.launchers import LAUNCHERS

from .arena import CROWD, Arena
from .case import CATEGORIES, Case
from .cases import CASES, named
from .conftest import record
from .faults import SCRIPTS
from .host import Host, alive, remains
from .sessions import SESSIONS, Session


@pytest.fixture(scope="module", params=["gvisor", "bubblewrap"])
def arena(request: pytest.FixtureRequest, host: Host) -> Iterator[Arena]:
    """A back-end, open for all tests of this file; nothing of it may be left afterwards."""
    if why := LAUNCHERS[request.param].missing(SandboxConfig()):
        pytest.skip(f"{request.param}: {why}")
    arena = Arena(request.param, host, 1)
    yield arena
    arena.close()
    assert not alive(arena.seen)
    assert not host.own()
    assert remains(f"retool-{os.getpid()}-") == []


def mark(arena: Arena, category: str, wrong: list[str]) -> None:
    record(arena.backend, category, not wrong)
    if wrong:
        pytest.fail("\n".join(wrong), pytrace=False)


def demand_isolation(arena: Arena) -> None:
    if arena.unfit:
        pytest.fail(f"not run, {arena.backend} does not isolate here: {arena.unfit}", pytrace=False)


@pytest.fixture(scope="module")
def crowd(request: pytest.FixtureRequest, arena: Arena, host: Host) -> Iterator[Arena]:
    """The same back-end with several workers, for cases that can run beside others."""
    crowd = Arena(arena.backend, host, CROWD)
    yield crowd
    crowd.close()
    arena.seen.update(crowd.seen)  # it saw the workers of `arena` too, which must be gone when that one is closed


@pytest.mark.parametrize("case", [case for case in CASES if case.sociable], ids=named)
def test_attack_among_others_is_held(crowd: Arena, case: Case):
    mark(crowd, case.category, crowd.attack_in_company(case, CASES))


@pytest.mark.parametrize("case", [case for case in CASES if not case.sociable], ids=named)
def test_attack_is_held(arena: Arena, case: Case):
    if not case.harmless:
        demand_isolation(arena)
    mark(arena, case.category, arena.runner.run(arena.attack(case)))


@pytest.mark.parametrize("session", SESSIONS, ids=lambda session: session.name.replace(" ", "-"))
def test_attack_in_a_session_is_held(crowd: Arena, session: Session):
    demand_isolation(crowd)
    mark(crowd, "sessions", crowd.converse_in_company(session, SESSIONS))


@pytest.mark.parametrize("name", SCRIPTS)
def test_fault_is_borne(arena: Arena, name: str):
    demand_isolation(arena)
    category, script = SCRIPTS[name]
    outcomes = arena.runner.run(script(arena))
    for wrong in outcomes.values():
        record(arena.backend, category, not wrong)
    if any(outcomes.values()):
        lines = [f"{what}: {text}" for what, wrong in outcomes.items() for text in wrong]
        pytest.fail("\n".join(lines), pytrace=False)


def test_there_are_enough_attacks_of_every_kind():
    kinds = [case.category for case in CASES] + ["sessions"] * len(SESSIONS) + [kind for kind, _ in SCRIPTS.values()]
    assert len(kinds) >= 120
    assert set(kinds) == set(CATEGORIES)
    assert len({(case.category, case.name) for case in CASES}) == len(CASES)
