"""The attacks that do no harm where nothing holds them, on `process`; what it does not hold is documented."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .arena import CROWD, Arena
from .case import Case
from .cases import CASES, named
from .conftest import record
from .host import Host, alive

DOCS = Path(__file__).resolve().parents[3] / "docs" / "sandbox.md"
NOT_HELD = {
    "files: reads the canary",
    "files: reads the canary through links",
    "files: looks for the host's folders",
    "network: connects to named sockets",
}

COMPANY = [case for case in CASES if f"{case.category}: {case.name}" not in NOT_HELD]


@pytest.fixture(scope="module")
def arena(host: Host) -> Iterator[Arena]:
    arena = Arena("process", host, CROWD)
    yield arena
    arena.close()
    assert not alive(arena.seen)
    assert not host.own()


@pytest.mark.parametrize("case", [case for case in CASES if case.harmless], ids=named)
def test_harmless_attack_is_held_or_documented(arena: Arena, case: Case):
    if case.sociable and f"{case.category}: {case.name}" not in NOT_HELD:
        wrong = arena.attack_in_company(case, COMPANY)
    else:
        wrong = arena.runner.run(arena.attack(case))
    record("process", case.category, not wrong)
    name = f"{case.category}: {case.name}"
    if wrong and name in NOT_HELD:
        assert f"`{name}`" in DOCS.read_text()
    elif wrong:
        pytest.fail("\n".join(wrong), pytrace=False)
