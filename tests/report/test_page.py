"""The report of a run that these tests make up: complete, self-contained, and deaf to hostile tool output."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import retool_jax
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.report.page import main
from retool_jax.rollout.rollout import score
from retool_jax.rollout.trajectory import INFRASTRUCTURE, Trajectory

ROOT = Path(retool_jax.__file__).parents[1]
HOSTILE = "<script>alert('owned')</script> &amp; <img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """The tags and attributes that a browser would see, and whether every tag closes."""

    def __init__(self, page: str):
        super().__init__()
        self.found, self.open = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "input", "br", "img", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def page_of(*words: str) -> str:
    main(list(words))
    return Path(words[0].removeprefix("run=").split(",")[0], "report.html").read_text()


def test_one_run_is_one_self_contained_file(make_run, tmp_path, capsys):
    page = page_of(f"run={make_run(tmp_path / 'a', 'python', 0)}")
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", page)
    elements = Elements(page)
    assert not elements.open
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in elements.found}
    assert all(
        attributes.get(name, "#").startswith("#") for _, attributes in elements.found for name in ("href", "src")
    )
    for words in (
        "46.0 % <span>→</span>",
        "256 test problems",
        "time by part",
        "Tool-call rate",
        "Cold-start loss",
        "answered",
    ):
        assert words in page
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(page) < 1_000_000 and "wrote" in capsys.readouterr().out


@pytest.fixture(scope="module")
def hostile_page(make_run, tmp_path_factory) -> str:
    """Of a run whose tool said something hostile, and much of it."""
    folder = tmp_path_factory.mktemp("hostile") / "a"
    return page_of(f"run={make_run(folder, 'python', 0, output=HOSTILE + 'x' * 50_000)}")


def test_hostile_tool_output_stays_text(hostile_page):
    page = hostile_page
    assert "&lt;script&gt;alert" in page
    tags = Elements(page).found
    assert sum(tag == "script" for tag, _ in tags) == 1
    assert not any(tag == "img" or any(name.startswith("onerror") for name in attributes) for tag, attributes in tags)


def test_several_runs_share_one_picture(make_run, tmp_path):
    folders = [make_run(tmp_path / name, tools, 0) for name, tools in (("a", "python"), ("b", "none"))]
    page = page_of(f"run={folders[0]}", f"run={folders[1]}")
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert "with tool (tools=python)" in picture and "text only (tools=none)" in picture
    assert "var(--series0)" in picture and "var(--series1)" in picture
    assert "test 46 → 80 %" in picture
    with pytest.raises(UserError, match="run folder nowhere does not exist"):  # in one word, too
        main([f"run={folders[0]},{folders[1]},nowhere"])


def test_what_the_machinery_lost_is_neither_right_nor_wrong(make_run, tmp_path, tokenizer):
    folder = make_run(tmp_path / "a", "python", 0)
    problem = Problem("dev-0", ({"role": "user", "content": "12 * 34?"},), "408")
    said = tokenizer.encode("It is \\boxed{407}")
    lost = [Trajectory("dev-0/0", problem, end=end, fault="its worker was lost") for end in INFRASTRUCTURE]
    for trajectory in lost:
        trajectory.add("prompt", tokenizer.encode("12 * 34?"))
        trajectory.add("policy", said, [-0.5] * len(said))
    score(tokenizer, lost)
    lines = [json.dumps(trajectory.record(tokenizer, split="dev", step=0)) + "\n" for trajectory in lost]
    for path in (folder / "trajectories").iterdir():
        path.write_text("".join(lines))
    page = page_of(f"run={folder}")
    cards = [attributes for _, attributes in Elements(page).found if "trajectory" in attributes.get("class", "")]
    assert [card["data-result"] for card in cards] == ["dropped"] * 2 * len(lost)
    facts = page[page.index('<details class="card trajectory"') :]
    for end in INFRASTRUCTURE:
        shown = f"<span>reward <b>-</b></span><span>end <b>{end.replace('_', ' ')}</b></span>"
        assert facts.count(shown) == 2
    assert "wrong" not in facts and "None" not in facts
    choices = page[page.index('<select name="result"') :].partition("</select>")[0]
    assert choices.endswith('<option value="">all results</option><option>dropped</option>')


def test_long_texts_are_cut_in_the_middle(hostile_page):
    assert "characters left out" in hostile_page and len(hostile_page) < 3_000_000


def test_a_run_in_its_first_minutes_and_a_cold_start_have_a_report(make_run, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0)
    (folder / "summary.json").unlink()
    assert "no summary yet" in page_of(f"run={folder}")
    (folder / "config.yaml").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"sft"' in line) + '{"kind": "sf')
    page = page_of(f"run={folder}")
    assert "Cold-start loss" in page and "Nothing was evaluated yet" in page


def test_bad_input_is_one_line_with_the_way_out(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("")
    for words, message in (
        ([], "usage"),
        (["runs=x"], "did you mean run="),
        ([f"run={tmp_path}/empty"], r"metrics.jsonl does not exist; .*retool_jax.train"),
        ([f"run={tmp_path}/torn"], "metrics.jsonl is empty"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)
    run = make_run(tmp_path / "a", "python", 0)
    with pytest.raises(UserError, match="cannot write"):
        main([f"run={run}", "out=/proc/nowhere/report.html"])


COMMAND = """
import atexit, runpy, sys
atexit.register(lambda: print(sorted({"jax", "transformers"} & set(sys.modules))))
runpy.run_module("retool_jax.report", run_name="__main__", alter_sys=True)
"""


def test_the_command_exits_with_2_and_imports_nothing_slow(tmp_path):
    command = [sys.executable, "-c", COMMAND, f"run={tmp_path}/nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2 and done.stdout == "[]\n"
    assert (
        done.stderr
        == f"error: run folder {tmp_path}/nowhere does not exist; `python -m retool_jax.train config=grpo` makes one\n"
    )
