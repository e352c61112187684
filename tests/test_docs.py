"""The documentation agrees with the code: its examples run as they stand there, what it names exists."""

import re
import shlex
from pathlib import Path

import pytest

import retool_jax
from retool_jax.run.load import load

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
PACKAGE = Path(retool_jax.__file__).parent
BLOCK = re.compile(r"^(```+)python\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["tools", "grammars", "rewards", "data"])
def test_the_code_of_a_page_runs_from_its_top_to_its_end(page):
    path = DOCS / f"{page}.md"
    text = path.read_text()
    blocks = list(BLOCK.finditer(text))
    assert blocks and any("assert" in block[2] for block in blocks)
    names: dict[str, object] = {"__name__": page}
    for block in blocks:
        above = text.count("\n", 0, block.start(2))
        exec(compile("\n" * above + block[2], str(path), "exec"), names)  # so that an error names the page's line


def test_the_table_of_rooms_has_every_module_and_none_that_is_gone():
    table = re.search(r"^\| room .*?\n\n", (DOCS / "architecture.md").read_text(), re.DOTALL | re.MULTILINE)[0]
    listed, room = set(), ""
    for line in table.strip().splitlines()[2:]:
        _, name, files, *_ = line.split("|")
        room = name.strip() or room
        folder = "" if room in ("entry", "around") else f"{room}/"
        listed |= {folder + file for file in re.findall(r"`([^`]+)`", files)}
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    whole = tuple(name for name in listed if name.endswith("/"))
    assert {name for name in modules - listed if not name.startswith(whole)} == set()
    assert {name for name in listed if not (PACKAGE / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_files_that_a_page_names_are_there(page):
    text = page.read_text()
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    files = re.findall(r"\b((?:\w+/)+\w+\.py)\b", text)
    assert files, "a page that says where nothing is"
    assert [file for file in files if not ((DOCS.parent / file).exists() or (PACKAGE / file).exists())] == []


def test_training_commands_of_the_pages_are_read():
    having = set()
    for page in (*PAGES, *(DOCS.parent / "configs").iterdir()):
        text = page.read_text().replace("\\\n", " ")
        for words in re.findall(r"python -m retool_jax\.train (config=[^#`\n]*)", text):
            load(shlex.split(words))
            having.add(page.name)
    assert {"README.md", "grammars.md", "sandbox.md", "tools.md", "sft_retool.yaml"} <= having
