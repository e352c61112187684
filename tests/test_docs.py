"""The documentation agrees with the code: its examples run, and what it names exists."""

import ast
import dataclasses
import re
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import retool_jax
from retool_jax.answers import Verdict
from retool_jax.data.problems import Problem
from retool_jax.evaluation.numbers import summarise
from retool_jax.fields import describe
from retool_jax.rollout.reward import default
from retool_jax.rollout.trajectory import End, ToolUse, Trajectory
from retool_jax.run.load import load
from retool_jax.run.schema import RLRun
from retool_jax.sandbox.types import Status
from retool_jax.tools.toolbox import INVALID

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
PACKAGE = Path(retool_jax.__file__).parent
BLOCK = re.compile(r"^(```+)python\n(.*?)^\1$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", ["tools", "grammars", "rewards", "data", "behaviour"])
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


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tokenizer) -> Trajectory:
    """A scored trajectory."""
    trajectory = Trajectory("p/0", Problem("p", ({"role": "user", "content": "?"},), "6"), end=End.ANSWERED)
    trajectory.add("prompt", [1])
    trajectory.add("policy", [2], [-0.5])
    trajectory.verdict = Verdict(True, "6", "integer")
    trajectory.reward = default(trajectory, trajectory.verdict)
    return trajectory


def test_a_number_is_defined_once_below_the_file_that_computes_it():
    found = []
    for section in (DOCS / "metrics.md").read_text().split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        source = "".join((PACKAGE / name).read_text() for name in re.findall(r"`([\w/]+\.py)`", title))
        for row in re.findall(r"^\| `.*", body, re.MULTILINE):
            name, *cells = row.strip("| ").split(" | ")
            assert len(cells) == 2 and all(cells), row
            found.append(name.strip("`"))
            last = re.sub("<.*", "", found[-1].rpartition("/")[2])
            assert re.sub(r"_(mean|std|p10|p90|p99|max)$", "", last) in source, f"{name} is not computed in {title}"
    assert len(found) > 50 and sorted(found) == sorted(set(found))


def test_numbers_of_trajectories_are_defined_and_unknown_ones_are_found(undefined, answered):
    numbers = summarise([answered], 0.0)
    assert undefined(numbers) == set()
    assert undefined({"accuracy", "val-core/dev/acc/mean@1", "acuracy", "val-core/dev/acc"}) == {
        "acuracy",
        "val-core/dev/acc",
    }
    assert {f"end/{end}" for end in End} <= numbers.keys()


# --- troubleshooting --------------------------------------------------------------------------------------------------

TROUBLE = (DOCS / "troubleshooting.md").read_text()
# What a page may name besides keys, numbers and what records hold: programs, errors and files of others, examples.
OTHERS = {"runsc", "bwrap", "PYTHONPATH", "MemoryError", "ModuleNotFoundError", "config.yaml", "042", "42"}


def test_keys_that_the_page_of_troubles_names_can_be_set():
    """The keys of one row are set together, since some need others."""
    keys, sections = {leaf.key for leaf in describe(RLRun)}, {field.name for field in dataclasses.fields(RLRun)}
    key_or_word = re.compile(rf"`((?:{'|'.join(sections)})\.[\w.]+)(=[^`…]+)?`")
    assert len(set(key_or_word.findall(TROUBLE))) > 25
    for line in TROUBLE.splitlines():
        named = key_or_word.findall(line)
        assert {key for key, _ in named} <= keys
        if words := [key + value for key, value in named if value]:
            load(["config=grpo", *words])


def test_words_that_the_page_of_troubles_names_exist(undefined, answered, tokenizer):
    fields = (*dataclasses.fields(ToolUse), *dataclasses.fields(RLRun))
    known = {*answered.record(tokenizer), *(field.name for field in fields), *OTHERS}
    known |= {*End, *typing.get_args(Status), INVALID, *re.findall(r"`(\w+)`", Verdict.__doc__)}
    words = {word for word in re.findall(r"`([^` …]+)`", TROUBLE) if not re.match(r"\w+\.\w+(\.|=|$)", word)}
    assert undefined(word for word in words if word not in known and not word.endswith(("/", ".py"))) == set()


def test_messages_that_the_page_of_troubles_explains_are_told():
    shown = [text for text in re.findall(r"`([^`]+)`", TROUBLE) if "…" in text or " " in text]
    messages = [text for text in shown if not text.startswith("python -m ")]
    assert len(messages) > 12
    told = list(texts())
    assert [message for message in messages if not any(message in text for text in told)] == []


def texts() -> Iterator[str]:
    """Every text in the package's code, with … in place of values."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
