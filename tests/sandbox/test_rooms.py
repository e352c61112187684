"""The rooms of the sandbox: imports never go up a storey, in a circle, or out of the package."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retool_jax.sandbox

PACKAGE = "retool_jax.sandbox"
FOLDER = Path(retool_jax.sandbox.__file__).parent
# From the bottom up: a module may import those of its own storey and of the storeys below.
STOREYS = (
    {"types", "text", "words"},
    {"launch"},
    {"host"},
    {"remote"},
    {"backends"},
    {"server", "image", "__init__"},
)
ERRORS = "retool_jax.errors"  # the only import from the rest of the project


def imports(path: Path) -> Iterator[str]:
    """Full names of all that a file imports, also inside functions and for type checkers; `a.b` for `from a import b`,
    because `b` may be a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} imports by a relative name, which this test does not follow"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules(folder: Path) -> dict[str, Path]:
    """The package's files by module name: "host.pool", "host", "__init__"."""
    parts = {path: path.relative_to(folder).with_suffix("").parts for path in sorted(folder.rglob("*.py"))}
    return {".".join(p[:-1] if p[1:] and p[-1] == "__init__" else p): path for path, p in parts.items()}


def arrows(folder: Path) -> dict[str, set[str]]:
    """Each module of the package with its imports: modules of the package by short name, others by full name."""
    known = modules(folder)

    def target(name: str, full: str) -> str:
        inner = full.removeprefix(f"{PACKAGE}.")
        if name.startswith("inside."):  # these programs import each other by bare names
            return f"inside.{full.partition('.')[0]}" if f"inside.{full.partition('.')[0]}" in known else full
        if inner == full:
            return full
        return inner if inner in known else inner.rpartition(".")[0] or "__init__"

    return {name: {target(name, full) for full in imports(path)} for name, path in known.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules in circles of imports, or between two of them; empty if there is none."""
    left = {name: others & graph.keys() for name, others in graph.items()}
    while ends := [name for name in left if not left[name] & left.keys() or not any(name in left[one] for one in left)]:
        for name in ends:  # no module that is left comes after it, or none before it
            left.pop(name)
    return sorted(left)


def faults(folder: Path) -> list[str]:
    """What is wrong with the imports of the package in a folder."""
    graph = arrows(folder)
    level = {name: level for level, names in enumerate(STOREYS) for name in names}
    wrong = []
    for name, others in graph.items():
        for other in sorted(others):
            if name.startswith("inside"):
                if other not in graph and other.partition(".")[0] not in sys.stdlib_module_names:
                    wrong.append(f"{name} imports {other}, which is not there where it runs")
            elif other.startswith("inside"):
                wrong.append(f"{name} imports {other}, which runs elsewhere")
            elif other in graph:
                if level[other.partition(".")[0]] > level[name.partition(".")[0]]:
                    wrong.append(f"{name} imports {other}, which stands above it")
            elif other.startswith("retool_jax") and not f"{other}.".startswith(f"{ERRORS}."):
                wrong.append(f"{name} imports {other}, another room of the project")
    if ring := circle(graph):
        wrong.append(f"a circle among {', '.join(ring)}")
    return wrong


def test_no_arrow_runs_up_or_in_a_circle_or_out_of_the_package():
    graph = arrows(FOLDER)
    assert {"host.crew", "launch.launchers", "types"} <= graph["host.pool"] and "tiers" not in graph["inside.call"]
    assert "inside.tiers" in graph["inside.supervisor"] and "host.pool" in graph["__init__"], "the walk sees arrows"
    assert faults(FOLDER) == []


@pytest.mark.parametrize(
    ("file", "line", "fault"),
    [
        ("launch/worker.py", "from retool_jax.sandbox.host.pool import Sandbox", "stands above it"),
        ("host/pool.py", "def f():\n    from retool_jax.sandbox.remote import client", "stands above it"),
        ("host/pool.py", "if TYPE_CHECKING:\n    from retool_jax.sandbox import open_sandbox", "stands above it"),
        ("host/crew.py", "from retool_jax.sandbox.host.pool import Sandbox", "a circle among host.crew, host.pool"),
        ("host/pool.py", "import retool_jax.config", "another room of the project"),
        ("host/pool.py", "from retool_jax import config", "another room of the project"),
        ("host/pool.py", "from retool_jax.sandbox.inside.wire import read_frame", "runs elsewhere"),
        ("inside/wire.py", "import numpy", "not there where it runs"),
        ("inside/wire.py", "import call", "a circle among inside.call, inside.wire"),
    ],
)
def test_an_arrow_in_the_wrong_direction_is_seen(file: str, line: str, fault: str, tmp_path: Path):
    house = {
        "__init__": "from retool_jax.sandbox.host.pool import Sandbox as open_sandbox",
        "types": "from retool_jax.errors import UserError",
        "host/__init__": "",
        "host/pool": "import asyncio\nfrom retool_jax.sandbox.host import crew",
        "host/crew": "from retool_jax.sandbox.types import Limits",
        "launch/worker": "from retool_jax.sandbox.types import Limits",
        "remote/client": "import aiohttp\nfrom retool_jax.sandbox.host.pool import Sandbox",
        "inside/call": "import os\nfrom wire import read_frame",
        "inside/wire": "import os.path",
    }
    for name, text in house.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert faults(tmp_path) == []
    path = tmp_path / file
    path.write_text(f"{path.read_text()}\n{line}")
    assert any(said.endswith(fault) for said in faults(tmp_path))
