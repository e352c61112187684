"""The host that judges attacks, and the table of attacks that were stopped."""

from collections import Counter
from collections.abc import Iterator

import pytest

from .case import CATEGORIES
from .host import Host

HELD: dict[str, Counter] = {}
TOTAL: dict[str, Counter] = {}


def record(backend: str, category: str, held: bool) -> None:
    """Count a case for the table."""
    TOTAL.setdefault(backend, Counter())[category] += 1
    HELD.setdefault(backend, Counter())[category] += held


@pytest.fixture(scope="module")  # not longer: meanwhile this process adopts orphans, which other tests would see
def host() -> Iterator[Host]:
    with Host() as host:
        yield host


def pytest_terminal_summary(terminalreporter) -> None:
    """Print held/total by category and back-end."""
    if not TOTAL:
        return
    backends = sorted(TOTAL)
    terminalreporter.section("attacks held")
    terminalreporter.line("".join([f"{'':12}", *(f"{name:>14}" for name in backends)]))
    for category in (*CATEGORIES, "in all"):
        cells = []
        for name in backends:
            held, total = HELD[name], TOTAL[name]
            cells.append((held.total(), total.total()) if category == "in all" else (held[category], total[category]))
        terminalreporter.line(f"{category:12}" + "".join(f"{f'{held}/{total}':>14}" for held, total in cells))
