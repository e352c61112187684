"""`python -m retool_jax.prepare`: what is kept and dropped, what is written, and words that it does not understand."""

import json
from pathlib import Path

import pytest

from retool_jax.data.problems import INSTRUCTION, load_problems
from retool_jax.data.traces import messages_of
from retool_jax.errors import UserError
from retool_jax.prepare import main, parse_words

DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report_of(out: Path) -> dict:
    return json.loads(out.with_suffix(".report.json").read_text())


def error_of(*words: str) -> str:
    with pytest.raises(UserError) as caught:
        main(list(words))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def trace(code: str, output: str, answer: str, question: str = "What is 3 + 4?", **columns) -> dict:
    text = f"I run it.\n<code>\n```python\n{code}\n```\n</code>\n<interpreter>\n{output}\n</interpreter>\n\nSo {answer}"
    prompt = f"Write code as <code>...</code>.\n\n*user question:*\n{question}"
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]} | columns


TRACES = [
    trace("print(3 + 4)", "7", "\\boxed{7}", ground_truth="7"),
    trace("print(3 + 4)", "7", "seven"),
    trace("print(3 + 5)", "7", "\\boxed{7}", reward_model={"ground_truth": "7"}),
    trace("print(3 + 4)", "7", "\\boxed{8}", ground_truth="7"),
    trace("print(3 * 4)", "12", "\\boxed{12}", question="What is 3 * 4?"),
    trace("print(3 * 4)", "12", "\\boxed{12}", question="What is 3 - 4?"),
    {"messages": []},
]


def test_traces_are_converted_and_the_others_counted(tmp_path, capsys):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "new" / "out.jsonl"
    main([f"source={source}", f"out={out}"])
    rows, report = read(out), report_of(out)
    assert len(rows) == report["kept"] == 5 and report["rows"] == 7
    assert report["dropped"] == [
        [2, "no box in the final turn"],
        [7, "no user turn followed by an assistant turn"],
    ]
    assert [messages_of(row) for row in rows] == [row["messages"] for row in rows], "sft.data reads what it wrote"
    assert rows[0]["messages"][0]["content"] == f"What is 3 + 4?\n\n{INSTRUCTION}"
    shown = capsys.readouterr().out
    assert "dropped: no box in the final turn" in shown and f"wrote {out} (5 rows)" in shown
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.jsonl", "out.report.json"]
    # Again, from its own output: nothing changes.
    main([f"source={out}", f"out={tmp_path / 'again.jsonl'}"])
    assert (tmp_path / "again.jsonl").read_bytes() == out.read_bytes()


def test_verification_runs_programs_and_checks_answers(tmp_path, capsys):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "out.jsonl"
    truths = write(tmp_path / "truths.jsonl", [{"problem": "What is  3 * 4?", "answer": 12}])
    main([f"source={source}", f"out={out}", "verify=true", "sandbox=process", f"answers={truths}"])
    report = report_of(out)
    assert report["outputs"] == {"same": 4, "differs": 1}
    assert [(item["row"], item["recorded"], item["real"]) for item in report["differences"]] == [(3, "7", "8")]
    assert report["answers"] == {"right": 3, "wrong": 1, "no truth to compare with": 1}
    assert [4, "wrong answer: 8 and not 7 (mismatch)"] in report["dropped"] and report["kept"] == 4
    assert [row["messages"][-1]["content"][-4:] for row in read(out)] == ["d{7}", "d{7}", "{12}", "{12}"]
    shown = capsys.readouterr().out
    assert "output run again: differs" in shown and "final answer: wrong" in shown and "verifying 5/5" in shown


def test_problems_are_cleaned_and_compared(tmp_path, capsys):
    long = "How many ways are there to colour the twelve edges of a cube with two colours?"
    rows = [
        {"problem": long, "answer": "1,234", "id": 1},
        {"problem": long, "answer": "1234", "id": 2},
        {"problem": "1 + 1?", "answer": "2", "id": 3},
        {"problem": "2 + 2?", "answer": "4", "id": 4},
        {"problem": "2 + 2?", "answer": "5", "id": 5},
        {"problem": "2 + 3?", "answer": None, "id": 6},
    ]
    source, out = write(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    held_out = write(tmp_path / "held_out.jsonl", [{"input": long.upper(), "output": "3"}])
    main([f"source={source}", f"out={out}", f"overlap={held_out}"])
    problems, report = load_problems(str(out)), report_of(out)
    assert [(problem.id, problem.ground_truth) for problem in problems] == [("1", "1234"), ("3", "2")]
    assert problems[1].question == f"1 + 1?\n\n{INSTRUCTION}"
    assert report["reasons"] == {"is no problem": 1, "repeats a question": 1, "its question has two answers": 2}
    assert sum(report["reasons"].values()) + report["kept"] == report["rows"] == 6
    ((found,),) = report["overlaps"].values()
    assert (found["line"], found["reference"], found["share"], found["question"]) == (1, 1, 1.0, long)
    assert "all of its words in held_out.jsonl" in capsys.readouterr().out


def test_a_limit_reads_the_first_rows_only(tmp_path):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "out.jsonl"
    main([f"source={source}", f"out={out}", "limit=2"])
    assert (report_of(out)["rows"], report_of(out)["kept"]) == (2, 1)


def test_reading_many_rows_shows_how_far_it_is(tmp_path, capsys):
    row = {"problem": "1 + 1?", "answer": "2"}
    source = write(tmp_path / "p.jsonl", [row] * 2000)
    main([f"source={source}", f"out={tmp_path / 'out.jsonl'}"])
    assert "reading 2000/2000" in capsys.readouterr().out
    assert report_of(tmp_path / "out.jsonl")["reasons"] == {"repeats a question": 1999}


def test_words_that_are_not_understood(tmp_path):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "out.jsonl"
    good = [f"source={source}", f"out={out}"]
    assert "no source given; usage: " in error_of("out=x.jsonl")
    assert "no out given; usage: " in error_of("source=x")
    for word, message in [
        ("sorce=x", "cannot read 'sorce=x'; did you mean source=...?"),
        ("verify", "cannot read 'verify'; did you mean verify=...?"),
        ("xyzzy=1", "it takes source, out, kind, verify, sandbox, answers, overlap, limit (see --help)"),
        ("kind=rows", "kind=rows is not one of: traces, problems"),
        ("verify=yes", "verify=yes is not one of: true, false"),
        ("limit=0", "limit=0 must be a whole number of rows, at least 1"),
        ("limit=1e3", "limit=1e3 must be a whole number"),
        ("answers=x", "answers=x is read with verify=true only"),
        ("sandbox=process", "sandbox=process is used with verify=true only"),
        ("out=x.parquet", "out=x.parquet must be a file named *.jsonl"),
        (f"out={source}", "is also read; choose another file"),
        (f"out={source}/x.jsonl", "is no folder that can be written"),
        ("overlap=nowhere.jsonl", "no data file nowhere.jsonl"),
        ("source=nowhere.jsonl", "no data file nowhere.jsonl"),
        ("kind=problems", "no row of "),
    ]:
        assert message in error_of(*good, word), word
    problems = write(tmp_path / "p.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    assert "verify=true checks traces" in error_of(f"source={problems}", f"out={out}", "verify=true")
    assert "has no rows" in error_of(f"source={write(tmp_path / 'none.jsonl', [])}", f"out={out}")
    assert not out.exists() and not out.with_suffix(".report.json").exists(), "nothing is written before an error"
    assert parse_words([*good, "overlap=a,b,", "verify=false"]).overlap == ("a", "b")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "out.jsonl"
    out.write_text("old")
    (tmp_path / "out.jsonl.tmp").mkdir()  # something stands where the new file would be written
    assert "cannot write" in error_of(f"source={source}", f"out={out}")
    assert out.read_text() == "old"


def test_help_names_every_key(capsys):
    main(["--help"])
    shown = capsys.readouterr().out
    for key in (
        "source=",
        "out=",
        "kind=traces",
        "kind=problems",
        "verify=",
        "sandbox=",
        "answers=",
        "overlap=",
        "limit=",
    ):
        assert key in shown
    assert max(map(len, shown.splitlines())) <= 120


@pytest.mark.skipif(not DATA.is_dir(), reason="no sample data beside this checkout")
def test_the_published_samples(tmp_path):
    for path in sorted((DATA / "retool_sft").glob("*.jsonl")):
        out = tmp_path / path.name
        main([f"source={path}", f"out={out}"])
        assert report_of(out)["kept"] == report_of(out)["rows"] == len(read(path))
    out, aime = tmp_path / "dapo.jsonl", DATA / "aime"
    main(
        [
            f"source={DATA / 'dapo' / 'dapo_math_17k_sample.jsonl'}",
            f"out={out}",
            f"overlap={aime / 'AIME24.jsonl'},{aime / 'AIME25.jsonl'}",
        ]
    )
    assert report_of(out)["kept"] == 28 and list(report_of(out)["overlaps"].values()) == [[], []]
    for year in ("24", "25"):
        main([f"source={aime / f'AIME{year}.jsonl'}", f"out={tmp_path / 'aime.jsonl'}"])
        assert report_of(tmp_path / "aime.jsonl")["kept"] == 30
    for name, rows in (("gsm8k/test", 1319), ("math500/math500", 500)):
        main([f"source={DATA / f'{name}.jsonl'}", f"out={tmp_path / 'more.jsonl'}"])
        assert report_of(tmp_path / "more.jsonl")["kept"] == rows == len(load_problems(str(tmp_path / "more.jsonl")))
    assert all(problem.ground_truth for problem in load_problems(str(tmp_path / "more.jsonl")))
