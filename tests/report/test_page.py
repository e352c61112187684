"""The report of a made-up run: complete, self-contained, and safe against hostile tool output."""

import base64
import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import retool_jax
from retool_jax.data.problems import Problem
from retool_jax.errors import UserError
from retool_jax.report.page import comparison, interval, main
from retool_jax.report.runs import load_runs
from retool_jax.rollout.rollout import score
from retool_jax.rollout.trajectory import INFRASTRUCTURE, Trajectory

ROOT = Path(retool_jax.__file__).parents[1]
HOSTILE = "</title><script>alert('owned')</script> &amp; <img src=x onerror=alert(1)>"


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


def test_one_run_is_one_self_contained_file(make_run, opened, tmp_path, capsys):
    folder = make_run(tmp_path / "a", "python", 0)
    main([f"run={folder}"])
    page = opened(folder / "report.html").html
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
        "Time by part",
        "Tool-call rate",
        "Cold-start loss",
        "answered",
    ):
        assert words in page
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(page) < 1_000_000 and "wrote" in capsys.readouterr().out


def test_the_only_script_that_may_run_is_the_pages_own(make_run, tmp_path):
    page = page_of(f"run={make_run(tmp_path / 'a', 'python', 0, curves=False)}")
    elements = Elements(page).found
    scripts = [attributes for tag, attributes in elements if tag == "script"]
    assert [attributes for attributes in scripts if attributes.get("type") != "text/plain"] == [{}]
    assert not [name for _, attributes in elements for name in attributes if name.startswith("on")]
    (policy,) = (a["content"] for _, a in elements if a.get("http-equiv") == "Content-Security-Policy")
    script = page.rpartition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none';" in policy
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(", script)


def test_a_hostile_config_stays_text(make_run, tmp_path):
    folders = [make_run(tmp_path / name, "python", 0, curves=False) for name in ("a", "b")]
    for folder, value in zip(folders, (HOSTILE, "b"), strict=True):
        config = json.loads((folder / "config.yaml").read_text()) | {"init_from": value.replace("/", "\\")}
        (folder / "config.yaml").write_text(json.dumps(config))
    page = page_of(f"run={folders[0]},{folders[1]}")
    tags = Elements(page).found
    assert "&lt;script&gt;alert" in page
    assert [tag for tag, attributes in tags if tag in ("script", "img") and "type" not in attributes] == ["script"]


def test_several_runs_share_one_picture(make_run, tmp_path):
    folders = [make_run(tmp_path / name, tools, 0) for name, tools in (("a", "python"), ("b", "none"))]
    page = page_of(f"run={folders[0]}", f"run={folders[1]}")
    picture = page[page.index("<svg") : page.index("</svg>")]
    assert "with tool (tools=python)" in picture and "text only (tools=none)" in picture
    assert "var(--series0)" in picture and "var(--series1)" in picture
    assert "test 46 → 80 %" in picture
    with pytest.raises(UserError, match="run folder nowhere does not exist"):  # in one word, too
        main([f"run={folders[0]},{folders[1]},nowhere"])
    with pytest.raises(UserError, match=rf"run={folders[0]} is given twice, and would count as two seeds"):
        main([f"run={folders[0]},{folders[1]}", f"run={folders[0]}/"])


def test_what_the_machinery_lost_is_neither_right_nor_wrong(make_run, opened, tmp_path, tokenizer):
    folder = make_run(tmp_path / "a", "python", 0, curves=False)
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
    main([f"run={folder}"])
    page = opened(folder / "report.html")
    ends = [end.replace("_", " ") for end in INFRASTRUCTURE]
    assert page.column("end") == ends * 5
    assert {page.index["outcomes"][outcome] for outcome in page.column("outcome")} == {"dropped"}
    assert [(shown["reward"], shown["fault"]) for shown in page.details] == [(None, "its worker was lost")] * 15


def test_a_run_in_its_first_minutes_and_a_cold_start_have_a_report(make_run, tmp_path):
    folder = make_run(tmp_path / "a", "python", 0)
    (folder / "summary.json").unlink()
    assert "no summary yet" in page_of(f"run={folder}")
    (folder / "config.yaml").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(line for line in lines if '"sft"' in line) + '{"kind": "sf')
    page = page_of(f"run={folder}")
    assert "Cold-start loss" in page and "Nothing was evaluated yet" in page and "(not finished)" in page
    (folder / "config.yaml").write_text("task: sft\n")
    page = page_of(f"run={folder}")
    assert "A cold start is not evaluated" in page and "(not finished)" not in page, "it never has a summary"


def test_bad_input_is_one_line_with_the_way_out(make_run, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("")
    for words, message in (
        ([], "usage"),
        (["runs=x"], "did you mean run="),
        (["run=x", "trajectories=some"], "trajectories=some must be a whole number"),
        ([f"run={tmp_path}/empty"], r"metrics.jsonl does not exist; .*retool_jax.train"),
        ([f"run={tmp_path}/torn"], "metrics.jsonl is empty"),
    ):
        with pytest.raises(UserError, match=message):
            main(words)
    run = make_run(tmp_path / "a,b", "python", 0)
    (run / "lock").write_text("")
    for out, message in (
        ("/proc/nowhere/report.html", "cannot write"),
        (run / "metrics.jsonl", "is a file of the run in"),
        (run / "trajectories" / "dev-000000.jsonl", "is a file of the run in"),
    ):
        with pytest.raises(UserError, match=message):
            main([f"run={run}", f"out={out}"])


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


# --- runs side by side ------------------------------------------------------------------------------------------------


def test_seeds_are_a_band_and_a_row_with_an_interval(make_run, tmp_path):
    folders = [make_run(tmp_path / f"{tools}{seed}", tools, seed) for tools in ("python", "none") for seed in (0, 1)]
    for folder, accuracy in zip(folders, (0.8, 0.9, 0.2, 0.2), strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        summary["before"]["accuracy"], summary["after"]["accuracy"] = 0.1, accuracy
        (folder / "summary.json").write_text(json.dumps(summary))
    rows = comparison(load_runs(folders))
    assert [(row["setting"], row["seeds"]) for row in rows] == [
        ("with tool (tools=python)", 2),
        ("text only (tools=none)", 2),
    ]
    half = 12.71 * 0.05  # Student's t with one degree of freedom, standard error of two seeds that are 0.1 apart
    assert rows[0]["after"] == pytest.approx((0.85, 0.85 - half, 0.85 + half))
    assert rows[0]["gain"] == pytest.approx((0.75, 0.75 - half, 0.75 + half))
    assert rows[1]["after"] == pytest.approx((0.2, 0.2 - 1.96 * 0.03, 0.2 + 1.96 * 0.03))  # equal seeds
    page = page_of(f"run={','.join(map(str, folders))}")
    assert "85.0 % (21." in page and "lowest to highest seed" in page


def test_a_run_alone_has_the_interval_of_its_problems():
    assert interval([0.5], [0.1]) == pytest.approx((0.5, 0.304, 0.696))
    assert interval([], []) is None
    for values, errors in (([0.5], [None]), ([0.5], [0.0]), ([0.5, 0.5], [0.0, None])):
        mean, *bounds = interval(values, errors)
        assert mean == 0.5 and all(map(math.isnan, bounds))


def test_seeds_that_agree_by_chance_have_the_interval_of_one_run():
    """Two values without a spread would give an interval without a width."""
    assert interval([0.5, 0.5], [0.1, 0.05]) == pytest.approx((0.5, 0.304, 0.696))
    assert interval([0.5, 0.51], [0.1, 0.1]) == pytest.approx((0.505, 0.505 - 12.71 * 0.005, 0.505 + 12.71 * 0.005))
