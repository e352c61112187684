"""`python -m retool_jax.prepare`: what is kept, dropped and written, and words that it refuses."""

import json
from pathlib import Path

import pytest

from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.problems import Problem, load_problems
from retool_jax.data.traces import boxed_answer, messages_of
from retool_jax.errors import UserError
from retool_jax.prepare import main, parse_words


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
    assert [row for row, _ in report["dropped"]] == [2, 4, 5, 6]
    assert report["dropped"][1][1] == "its question has two answers: 4 in row 4, 5 in row 5"
    ((found,),) = report["overlaps"].values()
    assert (found["line"], found["reference"], found["share"], found["question"]) == (1, 1, 1.0, long)
    assert "all of its words in held_out.jsonl" in capsys.readouterr().out


def test_ids_of_problems_do_not_depend_on_the_folder_of_their_source(tmp_path):
    made = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        source = write(folder / "p.jsonl", [{"problem": "1 + 1?", "answer": "2"}, {"problem": "2 + 2?", "answer": "4"}])
        main([f"source={source}", f"out={folder / 'out.jsonl'}", "kind=problems"])
        made.append((folder / "out.jsonl").read_text())
    assert made[0] == made[1]
    assert [problem.id for problem in load_problems(str(folder / "out.jsonl"))] == ["p row 1", "p row 2"]


def test_what_asks_for_another_form_is_counted_and_stays(tmp_path, capsys):
    odd = "Write the final answer in <result> tags."
    qwen = "Please reason step by step, and put your final answer within \\boxed{}."
    rows = [{"prompt": f"{a} + 1? {odd} {qwen}", "label": str(a + 1)} for a in range(3)]
    rows.append({"prompt": [{"role": "system", "content": qwen}, {"role": "user", "content": "2 * 2?"}], "label": "4"})
    source, out = write(tmp_path / "p.jsonl", rows), tmp_path / "out.jsonl"
    main([f"source={source}", f"out={out}"])
    assert report_of(out)["unknown"] == {odd: 3} and f"unknown instruction, kept: {odd}" in capsys.readouterr().out
    problems = load_problems(str(out))
    assert problems[0].question == f"0 + 1? {odd}\n\n{INSTRUCTION}"
    assert [turn["role"] for turn in problems[3].messages] == ["user"], "the system turn asked for a form only"
    source = write(tmp_path / "t.jsonl", [trace("print(7)", "7", "\\boxed{7}", f"3 + 4? {odd}", tools=["python"])])
    main([f"source={source}", f"out={out}"])
    assert report_of(out)["unknown"] == {odd: 1} and read(out)[0]["tools"] == ["python"]
    main([f"source={write(tmp_path / 'q.jsonl', rows[3:])}", f"out={out}"])
    assert report_of(out)["unknown"] == {}


def test_programs_are_made_of_annotations_and_kept_where_they_print_the_answer(tmp_path, capsys):
    rows = [
        {"question": "What are 2 dozens?", "answer": "They are 2*12 = <<2*12=24>>24 eggs.\n#### 24"},
        {"question": "What is 5% of 40?", "answer": "It is 40*5% = <<40*5%=2>>2.\n#### 2"},
        {"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"},
        {"question": "What is 7 - 3 - 3?", "answer": "It is <<7-3=4>>4, minus 3.\n#### 1"},
        {"question": "What is 2 ^ 3?", "answer": "It is <<2^3=8>>8.\n#### 8"},
        {"problem": "What is 2 + 3?", "answer": "5"},
    ]
    source, out = write(tmp_path / "g.jsonl", rows), tmp_path / "out.jsonl"
    main([f"source={source}", f"out={out}", "kind=gsm8k_code", "sandbox=process"])
    report, kept, twins = report_of(out), read(out), read(tmp_path / "out.text.jsonl")
    assert (report["rows"], report["kept"]) == (6, 2) and len(kept) == len(twins) == 2
    assert report["dropped"] == [
        [3, "no calculator annotation"],
        [4, "its program prints another value than the answer"],
        [5, "an annotation that is no arithmetic"],
        [6, "is no row of GSM8K: question, and answer with its #### line"],
    ]
    for row, twin, output in zip(kept, twins, ("24", "2.0"), strict=True):
        assert messages_of(row) == row["messages"] and messages_of(twin) == twin["messages"]
        assert row["messages"][0] == twin["messages"][0] and row["ground_truth"] == twin["ground_truth"]
        assert row["messages"][2] == {"role": "tool", "content": output}
        assert boxed_answer(row["messages"]) == boxed_answer(twin["messages"]) == row["ground_truth"]
    assert f"wrote {out}, {tmp_path / 'out.text.jsonl'} (2 rows)" in capsys.readouterr().out


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
        ("kind=rows", "kind=rows is not one of: traces, problems, gsm8k_code"),
        ("verify=yes", "verify=yes is not one of: false, true"),
        ("limit=0", "limit=0 must be at least 1"),
        ("limit=-3", "limit=-3 must be at least 0"),
        ("limit=1e3", "limit=1e3: Input should be a valid integer"),
        ("answers=x", "answers=x is read with verify=true only"),
        ("sandbox=process", "sandbox=process is used with verify=true or kind=gsm8k_code only"),
        ("out=x.parquet", "out=x.parquet must be a file named *.jsonl"),
        (f"out={source}", "which is also read; choose another file"),
        (f"out={source}/x.jsonl", "is not a writable folder"),
        ("overlap=nowhere.jsonl", "no data file nowhere.jsonl"),
        ("source=nowhere.jsonl", "no data file nowhere.jsonl"),
    ]:
        assert message in error_of(*good, word), word
    unanswered = write(tmp_path / "unanswered.jsonl", TRACES[1:2])
    assert "no row of " in error_of(f"source={unanswered}", f"out={out}", "kind=problems")
    problems = write(tmp_path / "p.jsonl", [{"problem": "1 + 1?", "answer": "2"}])
    assert "verify=true checks traces" in error_of(f"source={problems}", f"out={out}", "verify=true")
    assert "has no rows" in error_of(f"source={write(tmp_path / 'none.jsonl', [])}", f"out={out}")
    assert not out.exists() and not out.with_suffix(".report.json").exists(), "nothing is written before an error"
    assert parse_words([*good, "overlap=a,b,", "verify=false"]).overlap == ("a", "b")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    source, out = write(tmp_path / "raw.jsonl", TRACES), tmp_path / "out.jsonl"
    out.write_text("old")
    (tmp_path / "out.tmp").mkdir()  # something stands where the new file would be written
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
        "kind=gsm8k_code",
        "verify=",
        "sandbox=",
        "answers=",
        "overlap=",
        "limit=",
    ):
        assert key in shown
    assert max(map(len, shown.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------------ published sets

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n%s\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
RETOOL_QUESTION = (
    "Answer the following Math Problem and put the answer in the format of \\boxed{answer}\n\nWhat is 3 + 4?\n\n\n"
    "Remember to place the final answer in the last part using the format: \n"
)


def dapo(index: str, question: str, answer: str) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_PROMPT % question, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


# Rows in the columns and the ways of public sets, with the answers that they have.
PUBLISHED = {
    "DAPO-Math-17k": (
        [
            dapo("2f1c6a5e-6b0c-4c7e-9a53-0d7b1a1f3c21", r"Find the least $k > 0$ with $2^k \equiv 1 \pmod{31}$.", "5"),
            dapo("d0b8f7aa-0f58-4f2e-8f0b-5f2a3f6f9e02", "已知 $x+3=0$。求 $x$ 的值。", "-3"),
            dapo("77b2f0c4-9a0e-4f55-b7f6-1c8f2b9d4e03", "Find\n\n\\[\n\\sum_{k=1}^{9} k^3.\n\\]\n", "2025"),
        ],
        ["5", "-3", "2025"],
    ),
    "AIME of ReTool": (
        [
            {"input": r"Find the area of a triangle with sides \(13\), \(14\) and \(15\).", "output": "84"},
            {
                "input": "How many proper divisors of $2^{10}$ end in the digit $2$?\n\\[\\text{Count } 2.\\]",
                "output": "3",
            },
        ],
        ["84", "3"],
    ),
    "AIME_2024": (
        [{"ID": "A-1", "Problem": "Find $12^2 + 16^2$.", "Solution": "It is $20^2$.", "Answer": 400}],
        ["400"],
    ),
    "aime_2025": (
        [{"id": "0", "problem": "Find the sum of the angles of a hexagon in degrees.", "answer": r"720^\circ"}],
        ["720"],
    ),
    "GSM8K": (
        [
            {
                "question": "A baker\u2019s oven holds 24 rolls. He fills it 3 times and burns 2. How many are good?",
                "answer": "He bakes 24 * 3 = <<24*3=72>>72 rolls.\nOf them 72 - 2 = <<72-2=70>>70 are good.\n#### 70",
            },
            {
                "question": "A car costs $1,250 a year and a bicycle $50. How much more does the car cost?",
                "answer": "The car costs 1250 - 50 = $<<1250-50=1200>>1,200 more.\n#### 1,200",
            },
        ],
        ["70", "1200"],
    ),
    "MATH-500": (
        [
            {
                "problem": r"Write the point $(0, -2)$ in polar coordinates.",
                "answer": r"\left( 2, \frac{3 \pi}{2} \right)",
            },
            {"problem": "What are the roots of $x^2 = 7$?", "answer": r"\pm \sqrt{7}"},
            {
                "problem": "Is $x \\mapsto x^2$ odd or even?\n\n[asy]\ndraw((0,0)--(1,1));\n[/asy]",
                "answer": r"\text{even}",
            },
            {"problem": "How many cents are $10,\\!240$ dollars?", "answer": r"1,\!024,\!000"},
        ],
        [r"\left( 2, \frac{3 \pi}{2} \right)", r"\pm \sqrt{7}", r"\text{even}", r"1,\!024,\!000"],
    ),
}


def test_rows_as_they_are_published_are_all_kept(tmp_path):
    sources = {name: write(tmp_path / f"{name}.jsonl", rows) for name, (rows, _) in PUBLISHED.items()}
    for name, (rows, answers) in PUBLISHED.items():
        out = tmp_path / "out.jsonl"
        main([f"source={sources[name]}", f"out={out}"])
        assert report_of(out)["kept"] == report_of(out)["rows"] == len(rows), name
        assert [problem.ground_truth for problem in load_problems(str(out))] == answers, name
    others = f"{sources['AIME of ReTool']},{sources['MATH-500']}"
    main([f"source={sources['DAPO-Math-17k']}", f"out={out}", f"overlap={others}"])
    assert report_of(out)["kept"] == 3 and list(report_of(out)["overlaps"].values()) == [[], []]


def test_both_published_forms_of_a_trace_are_kept_and_become_one(tmp_path):
    text = "I run it.\n<code>\n```python\nprint(3 + 4)\n```\n</code>\n<interpreter>\n7\n</interpreter>\n\nSo it is.\n\n"
    answer = "\\boxed{'The final answer goes here.'}"
    raw = [
        {"role": "user", "content": f"*user question:*\n{RETOOL_QUESTION}<answer>\n{answer}\n</answer>"},
        {"role": "assistant", "content": f"{text}<answer>\n\\boxed{{7}}\n</answer>"},
    ]
    call = {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": "print(3 + 4)"}}}
    turns = [
        {"role": "user", "content": f"{RETOOL_QUESTION}\n{answer}"},
        {"role": "assistant", "content": "I run it.", "tool_calls": [call]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "So it is.\n\n\n\\boxed{7}"},
    ]
    tools = [{"type": "function", "function": {"name": "code_interpreter", "description": "A tool."}}]
    source = write(tmp_path / "raw.jsonl", [{"messages": raw}, {"messages": turns, "tools": tools}])
    out = tmp_path / "out.jsonl"
    main([f"source={source}", f"out={out}"])
    first, second = read(out)
    assert report_of(out)["kept"] == 2 and first == second
    assert first["messages"][0]["content"] == f"What is 3 + 4?\n\n{INSTRUCTION}"


def test_whole_public_sets_are_kept(tmp_path, local_data):
    out = tmp_path / "out.jsonl"

    def prepare(name: str, rows: int, *words: str) -> list[Problem]:
        main([f"source={local_data(name)}", f"out={out}", *words])
        problems = load_problems(str(out))
        assert report_of(out)["kept"] == report_of(out)["rows"] == rows == len(problems), name
        assert report_of(out)["unknown"] == {}, name
        return problems

    answers = []
    for name in ("multiturn_sample", "sft_sample", "sft_synthetic"):
        source = local_data(f"retool_sft/retool_{name}.jsonl")
        main([f"source={source}", f"out={out}"])
        assert report_of(out)["kept"] == report_of(out)["rows"] == len(read(source))
        assert report_of(out)["unknown"] == {}
        answers += [boxed_answer(row["messages"]) for row in read(out)]
    assert answers == ["3", "3", "40", "807", "80", "45", "12", "60"]
    years = [local_data(f"aime/AIME{year}.jsonl") for year in (24, 25)]
    for year, ends in zip(years, (("45", "699"), ("70", "240")), strict=True):
        problems = prepare(f"aime/{year.name}", 30, f"overlap={years[0]},{years[1]}")
        assert (problems[0].ground_truth, problems[-1].ground_truth) == ends
        found = [len(overlaps) for overlaps in report_of(out)["overlaps"].values()]
        assert found == [30 * (year == other) for other in years]
    problems = prepare("dapo/dapo_math_17k_sample.jsonl", 28, f"overlap={years[0]},{years[1]}")
    assert list(report_of(out)["overlaps"].values()) == [[], []] and problems[0].ground_truth == "34"
    for problem in problems:
        assert problem.question.endswith(f"\n\n{INSTRUCTION}") and problem.question.count("boxed") == 1
        assert "Answer:" not in problem.question and "step by step. The last line" not in problem.question
    prepare("gsm8k/test.jsonl", 1319)
    prepare("gsm8k/train_first1000.jsonl", 1000)
    prepare("deepmath/deepmath_first600.jsonl", 600)
    assert all(problem.ground_truth for problem in prepare("math500/math500.jsonl", 500))
