"""Imports between rooms go in one direction, and no file is too long to read."""

import ast
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest

import retool_jax

FOLDER = Path(retool_jax.__file__).parent
LONGEST = 450  # lines of a file

# From the ground up: a room knows those of its own floor and of the floors below it.
FLOORS = (
    {"errors", "fields", "files", "memory", "shapes", "slices"},
    {"hosts_config", "hosts"},
    {"mesh_config", "mesh", "clock", "compile_cache", "trackers", "metrics", "checkpoint"},
    {"models", "tokens"},
    {"sandbox"},
    {"answers"},
    {"data"},
    {"tools"},
    {"engine"},
    {"rollout"},
    {"evaluation"},
    {"learn"},
    {"sft", "rl"},
    {"serving"},
    {"run"},
    {"report", "export", "plan"},
    {"train", "evaluate", "serve", "prepare", "convert", "__main__"},
)


def package() -> dict[str, str]:
    """The source of every module below the package: "run.load", "sandbox" for its `__init__.py`."""
    found = {}
    for path in sorted(FOLDER.rglob("*.py")):
        *above, name = path.relative_to(FOLDER).with_suffix("").parts
        found[".".join(above if name == "__init__" and above else [*above, name])] = path.read_text()
    return found


@functools.cache
def imports(source: str) -> list[str]:
    """The modules of the package that a module imports, without the package's name, also inside of functions and for
    type checkers."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import, which this test does not follow"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [name.removeprefix("retool_jax.") for name in names if name.startswith("retool_jax.")]
    return found


def room_of(name: str) -> str:
    """The room of a module, or of something in one."""
    return name.partition(".")[0]


def arrows(modules: Mapping[str, str]) -> set[tuple[str, str]]:
    """(module, other room that it imports) for every module; those of `sandbox.inside` run elsewhere, by themselves."""
    outer = {name: source for name, source in modules.items() if not name.startswith("sandbox.inside.")}
    pairs = {(name, room_of(target)) for name, source in outer.items() for target in imports(source)}
    return {(name, room) for name, room in pairs if room != room_of(name)}


def runs_up(modules: Mapping[str, str]) -> set[tuple[str, str]]:
    """The imports of a room on a higher floor."""
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    return {(name, room) for name, room in arrows(modules) if floor[room] > floor[room_of(name)]}


def circles(modules: Mapping[str, str]) -> set[str]:
    """Rooms that can be reached from themselves through imports that do not go up."""
    knows: dict[str, set[str]] = {}
    for name, room in arrows(modules) - runs_up(modules):
        knows.setdefault(room_of(name), set()).add(room)

    def reached(room: str, seen: set[str]) -> set[str]:
        for other in knows.get(room, set()) - seen:
            seen.add(other)
            reached(other, seen)
        return seen

    return {room for room in knows if room in reached(room, set())}


def test_every_module_is_in_a_room_of_the_house():
    names = package().keys() - {"__init__"}
    assert {"run.load", "rl.loop", "sandbox", "engine.config"} <= names
    assert {room_of(name) for name in names} <= set().union(*FLOORS)


def test_no_arrow_runs_up_and_none_in_a_circle():
    assert {("run.schema", "rl"), ("rl.learner", "learn"), ("convert", "run")} <= arrows(package()), (
        "the walk sees arrows"
    )
    assert runs_up(package()) == set()
    assert circles(package()) == set()


def test_no_file_is_longer_than_one_reads():
    assert {name for name, source in package().items() if source.count("\n") > LONGEST} == set()


@pytest.mark.parametrize(
    ("module", "line", "room"),
    [
        ("models.cache", "from retool_jax.engine.pages import Pages", "engine"),
        ("models.cache", "def f():\n    from retool_jax.run import load", "run"),
        ("models.cache", "if TYPE_CHECKING:\n    import retool_jax.learn.config", "learn"),
        ("rl.loop", "from retool_jax.run.schema import RLRun", "run"),
        ("mesh", "from retool_jax import train", "train"),
    ],
)
def test_an_arrow_that_runs_up_is_found(module, line, room):
    modules = package()
    modules[module] += f"\n{line}\n"
    assert runs_up(modules) == {(module, room)}


def test_a_circle_on_one_floor_is_found():
    modules = package()
    modules["sft.loop"] += "\nfrom retool_jax.rl.loss import clipped_policy_loss\n"
    assert circles(modules) == set(), "one may know the other"
    modules["rl.loop"] += "\nfrom retool_jax.sft import loop\n"
    assert circles(modules) == {"rl", "sft"}
