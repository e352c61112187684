"""The rooms `answers` and `data` import only the rooms below them."""

import ast
from pathlib import Path

import pytest

import retool_jax

PACKAGE = Path(retool_jax.__file__).parent


def imported_by(room: str) -> set[str]:
    """The rooms of the package that the modules of one import from, itself left out."""
    found = set()
    for path in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[1] for name in names if name.startswith("retool_jax.")}
    return found - {room}


@pytest.mark.parametrize(
    ("room", "below"),
    [
        ("answers", {"errors"}),
        ("data", {"answers", "sandbox", "tokens", "errors", "fields", "shapes"}),
    ],
)
def test_a_room_knows_only_what_is_below_it(room, below):
    assert imported_by(room) <= below
