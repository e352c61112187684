"""Problems come from files in DAPO's columns, in an order that the seed decides; a bad row is named."""

import importlib.util
import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool_jax.data.arithmetic import problem_row
from retool_jax.data.config import SetConfig
from retool_jax.data.instructions import INSTRUCTION
from retool_jax.data.problems import Problems, clean, digest_of, load_problems, problems_of_set, to_problem
from retool_jax.data.sources import read_rows
from retool_jax.errors import UserError

DAPO_PROMPT = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "%s (without quotes) where $Answer is the answer to the problem.\n\n%s\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
# In the ways of DAPO-Math-17k: every delimiter of TeX, several lines, a list, Chinese, one question in two wordings.
QUESTIONS = [
    (r"Triangle $ABC$ has $AB = AC = 10$ and $\cos \angle A = \frac{3}{5}$. Find $BC^2$.", "80"),
    (r"For which positive integer $n$ is $n^2 + 15$ equal to $(n + 1)^2$?", "7"),
    (r"Find the sum \[ \sum_{a + b = 9} (a - b) \] over all pairs $(a, b)$ of positive integers.", "0"),
    ("Determine the sum\n\\[\n\\sum_{a+b=9} (a-b)\n\\]\nover the pairs $(a,b)$ of positive integers.", "0"),
    ("Find all integers $k$ for which the following has a double positive root:\n\n$$x^2 + kx + 16.$$", "-8"),
    ("A move is one of these:  \n1. Double the number.\n2. Take $3$ away.\n\nHow few lead from $5$ to $4$?", "2"),
    ("求满足 $x^2+y^2=25$ 的正整数对 $(x,y)$ 的个数。", "2"),
    ("已知 $a+b=7$ 且 $ab=10$。求 $a^2+b^2$ 的值。\n", "29"),
    (r"Evaluate \(2^{10} - 10^{2}\).", "924"),
    ("A ticket costs an adult $3$ coins and a child $2$ coins. What do three of each cost together? ", "15"),
    *[
        (f"Find the remainder when ${n}^{{2025}}$ is divided by ${n + 4}$.", f"{pow(n, 2025, n + 4)}")
        for n in range(2, 20)
    ],
]


def dapo_row(number: int, question: str, answer: str) -> dict:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_PROMPT % ("$Answer", question), "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": str(uuid.UUID(int=number, version=4))},
    }


def rows_of(count: int) -> list[dict]:
    return [problem_row("train", index) for index in range(count)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        from datasets import Dataset  # which imports PyTorch

        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_a_file_is_read_whole_and_in_order(tmp_path, name):
    rows = rows_of(30)
    problems = load_problems(write(tmp_path / name, rows))
    assert problems == [to_problem(row, "") for row in rows]
    assert problems[3].question == rows[3]["prompt"][0]["content"]
    assert problems[3].ground_truth == rows[3]["reward_model"]["ground_truth"]


def test_the_train_split_is_repeated_in_a_new_order_each_epoch(tmp_path):
    source = write(tmp_path / "p.jsonl", rows_of(20))
    stream = Problems(source, "train", seed=3)
    epochs = [[stream[epoch * 20 + i].id for i in range(20)] for epoch in range(3)]
    everything = sorted(problem.id for problem in stream.finite)
    assert all(sorted(epoch) == everything for epoch in epochs), "each epoch has every problem once"
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != everything
    again = Problems(source, "train", seed=3)
    assert [again[i].id for i in reversed(range(60))] == [name for epoch in epochs for name in epoch][::-1]
    other = Problems(source, "train", seed=4)
    assert [other[i].id for i in range(20)] != epochs[0]


def test_held_out_splits_keep_their_order(tmp_path):
    source = write(tmp_path / "p.jsonl", rows_of(6))
    stream = Problems(source, "dev", seed=3)
    assert [stream[i].id for i in range(8)] == [f"train-{i % 6:06d}" for i in range(8)]
    assert len(stream.head(4)) == 4 and len(stream.head(100)) == 6


def test_the_miniature_is_endless():
    stream = Problems("arithmetic", "test", seed=5)
    assert stream[10**7] == Problems("arithmetic", "test", seed=5)[10**7]
    assert len(stream.head(7)) == 7 and stream.finite is None


def test_runs_of_different_seeds_are_measured_on_the_same_problems():
    for split, same in (("train", False), ("dev", True), ("test", True)):
        heads = [Problems("arithmetic", split, seed).head(40) for seed in (0, 1, 7)]
        assert [head == heads[0] for head in heads] == [True, same, same], split


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_the_published_columns_are_understood(tmp_path, name):
    rows = [dapo_row(number, *pair) for number, pair in enumerate(QUESTIONS)]
    problems = load_problems(write(tmp_path / name, rows))
    assert len(problems) == len({problem.id for problem in problems}) == len(rows) > 20
    assert [problem.ground_truth for problem in problems] == [answer for _, answer in QUESTIONS]
    assert [problem.question for problem in problems] == [DAPO_PROMPT % ("$Answer", asked) for asked, _ in QUESTIONS]


GOOD = problem_row("train", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"reward_model": {"ground_truth": ""}},
            "has an empty reward_model.ground_truth; every problem needs an answer",
        ),
        ({"reward_model": {"ground_truth": "  "}}, "has an empty reward_model.ground_truth"),
        ({"reward_model": {"ground_truth": None}}, "has an empty reward_model.ground_truth"),
        ({"reward_model": {"style": "rule"}}, "has an empty reward_model.ground_truth"),
        ({"reward_model": None}, "has an empty reward_model.ground_truth"),
        ({"reward_model": "34"}, "reward_model and extra_info must be objects"),
        ({"extra_info": "7"}, "reward_model and extra_info must be objects"),
        ({"prompt": []}, "has no usable prompt; expected a list of messages with role and content"),
        ({"prompt": None}, "has no usable prompt"),
        ({"prompt": [{"role": "user", "content": ""}]}, "has no usable prompt"),
        ({"prompt": [{"role": "user", "content": None}]}, "has no usable prompt"),
        ({"prompt": [{"content": "What is 2 + 2?"}]}, "has no usable prompt"),
    ],
)
def test_a_bad_row_is_named(change, message):
    with pytest.raises(UserError) as caught:
        to_problem(GOOD | change, "mine.jsonl row 3")
    assert str(caught.value).startswith("mine.jsonl row 3") and message in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "reward_model"])
def test_a_missing_column_is_named(tmp_path, column):
    rows = [{key: value for key, value in row.items() if key != column} for row in rows_of(3)]
    source = write(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=rf"{source} row 1 has no column '{column}'; it has ability, data_source"):
        load_problems(source)


def test_answers_and_ids_that_are_not_text():
    assert to_problem(GOOD | {"reward_model": {"ground_truth": 0}}, "x").ground_truth == "0", "zero is an answer"
    assert to_problem(GOOD | {"extra_info": {"index": 0}}, "x").id == "0"
    assert to_problem(GOOD | {"extra_info": {"index": None}}, "row 3").id == "row 3"
    assert to_problem({key: GOOD[key] for key in ("prompt", "reward_model")}, "row 3").id == "row 3"


def test_two_problems_of_one_id_are_refused(tmp_path):
    """Ids distinguish prompts; the published file repeats whole rows, which count once."""
    first, second = rows_of(2)
    assert len(load_problems(write(tmp_path / "same.jsonl", [first, second, first]))) == 2
    source = write(tmp_path / "p.jsonl", [first, second | {"extra_info": first["extra_info"]}])
    with pytest.raises(UserError, match=r"row 2 has the id 'train-000000' of another problem, that of row 1"):
        load_problems(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b"not json\n", "cannot read data"),
        ("p.jsonl", b'{"prompt": [\n', "cannot read data"),
        ("p.parquet", b"PAR1 no", "cannot read data"),
        ("p.jsonl", b"", "p.jsonl"),
    ],
)
def test_a_file_that_is_no_data(tmp_path, capfd, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_problems(str(tmp_path / name))
    assert message in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"no data file nowhere.jsonl; give a JSONL or parquet file, a hub id"):
        load_problems("nowhere.jsonl")


def test_rows_of_json_keep_their_own_columns(tmp_path):
    """A reader that gives every row the columns of all rows would change the content of a row."""
    rows = [{"problem": "1 + 1?", "answer": 2}, {"question": "2 + 2?", "answer": "4"}]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert [problem.ground_truth for problem in load_problems(str(tmp_path / "p.json"))] == ["2", "4"]
    (tmp_path / "q.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert len(load_problems(str(tmp_path / "q.json"))) == 2
    (tmp_path / "r.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"cannot read data .*r.jsonl \(.*a row is not an object\)"):
        load_problems(str(tmp_path / "r.jsonl"))
    (tmp_path / "s.jsonl").write_text('{"problem": 1}\n{"pro')
    with pytest.raises(UserError, match=r"s.jsonl \(line 2: "):
        load_problems(str(tmp_path / "s.jsonl"))


def test_files_as_other_programs_write_them(tmp_path):
    row = {"problem": "1 + 1?", "answer": 2}
    line = json.dumps(row)
    for name, text in (
        ("mark.jsonl", "\ufeff" + line + "\r\n\r\n" + line),
        ("mark.json", f"\ufeff\n [{line}]"),
        ("pretty.json", json.dumps(row, indent=1)),
        ("UPPER.JSONL", line),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert {problem.ground_truth for problem in load_problems(str(tmp_path / name))} == {"2"}
    (tmp_path / "half.jsonl").write_text('{"problem": "a \\ud800?", "answer": "\\uDFFF"}')
    (problem,) = load_problems(str(tmp_path / "half.jsonl"))
    assert r"a \ud800?" in problem.question and problem.ground_truth == r"\udfff"
    for name in ("rows.txt", "rows"):
        (tmp_path / name).write_text(line)
        with pytest.raises(
            UserError,
            match=r"its name ends in none of .jsonl, .json and .parquet; write it in one of these forms, or rename it",
        ):
            load_problems(str(tmp_path / name))
    for name in ("", ":", "/"):
        with pytest.raises(UserError, match="no data are named by"):
            load_problems(name)


def test_parquet_with_bytes_for_texts_and_without_rows(tmp_path):
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"question": [b"1 + 1?"], "answer": [b"2"]}), path)
    (problem,) = load_problems(path)
    assert problem.question.startswith("1 + 1?") and problem.ground_truth == "2"
    pq.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    with pytest.raises(UserError, match=r"has no rows; give at least one problem"):
        load_problems(path)


def test_a_parquet_file_is_read_anew_each_time_and_may_be_damaged_in_the_middle(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_pylist([{"problem": f"{n}?", "answer": n} for n in range(5000)]), path)
    rows = read_rows(str(path))
    assert len(rows) == 5000 and [row["answer"] for row in rows] == [row["answer"] for row in rows] == [*range(5000)]
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + bytes(2000) + whole[2004:])  # its end, which says where the columns are, is good
    with pytest.raises(UserError, match=r"cannot read data .*x.parquet \(.*\); give a JSONL or parquet file"):
        list(read_rows(str(path)))


def test_sources_of_tensorflow_datasets():
    with pytest.raises(UserError, match="write tfds:NAME/SPLIT"):
        load_problems("tfds:gsm8k")
    if importlib.util.find_spec("tensorflow_datasets"):
        pytest.skip("tensorflow-datasets is installed; its absence cannot be shown")
    with pytest.raises(UserError, match=r"tfds:gsm8k/test needs the package tensorflow-datasets .*retool_jax\[tfds\]"):
        load_problems("tfds:gsm8k/test")


# -------------------------------------------------------------------------------------------- prompts and repeats


def problem_of(index: str, question: str, answer: str):
    return to_problem(
        {
            "prompt": [{"role": "user", "content": DAPO_PROMPT % ("$Answer", question)}],
            "reward_model": {"ground_truth": answer},
            "extra_info": {"index": index},
        },
        "here",
    )


def test_repeats_and_contradictions_are_dropped():
    rows = [
        *[problem_of("a", "one?", "1")] * 100,
        problem_of("b", "one?  ", "1"),
        problem_of("c", "two?", "2"),
        problem_of("d", "two?", "3"),
        problem_of("e", "two?", "2"),
        problem_of("f", "three?", "3"),
        problem_of("f", "another?", "3"),
        problem_of("g", "put \b it", "3"),
    ]
    kept, reasons, dropped = clean(enumerate(rows, start=1))
    assert [(problem.id, problem.question) for problem in kept] == [
        ("a", f"one?\n\n{INSTRUCTION}"),
        ("f", f"three?\n\n{INSTRUCTION}"),
    ]
    assert reasons == {
        "repeats a row": 99,
        "repeats a question": 1,
        "its question has two answers": 3,
        "has the id of another row": 1,
        "has control characters": 1,
    }
    assert sum(reasons.values()) + len(kept) == len(rows)
    answers = "2 in row 102, 3 in row 103, 2 in row 104"
    assert sorted(dropped) == [
        (101, "repeats a question: that of row 1"),
        *((row, f"its question has two answers: {answers}") for row in (102, 103, 104)),
        (106, "has the id of another row: 'f', as row 105"),
        (107, r"has control characters: '\x08'"),
    ]
    assert clean(enumerate(kept)) == (kept, {}, []), "what is clean stays as it is"


def test_what_precedes_the_question_stays():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "one?"}]
    kept, *_ = clean([(1, to_problem({"prompt": messages, "reward_model": {"ground_truth": "1"}}, "here"))])
    assert kept[0].messages == (messages[0], {"role": "user", "content": f"one?\n\n{INSTRUCTION}"})


def test_the_published_prompt_is_repaired(tmp_path):
    source = write(tmp_path / "p.jsonl", [dapo_row(number, *pair) for number, pair in enumerate(QUESTIONS)])
    problems = load_problems(source)
    kept, reasons, dropped = clean(enumerate(problems * 2))
    assert len(kept) == len(problems) == 28 and reasons == {"repeats a row": 28} and not dropped
    assert [problem.question for problem in kept] == [f"{asked.strip()}\n\n{INSTRUCTION}" for asked, _ in QUESTIONS]
    for problem in kept:
        assert problem.question.count("boxed") == 1
        assert "Answer:" not in problem.question and "step by step. The last line" not in problem.question


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_set_of_an_evaluation_is_read_in_its_order_with_its_own_columns(tmp_path, suffix):
    rows = [{"nr": i, "frage": asked, "gold": answer} for i, (asked, answer) in enumerate(QUESTIONS)]
    config = SetConfig(write(tmp_path / f"own.{suffix}", rows), question="frage", answer="gold", id="nr")
    found = problems_of_set(config, 0)
    assert [(p.id, p.ground_truth) for p in found] == [(str(i), answer) for i, (_, answer) in enumerate(QUESTIONS)]
    assert problems_of_set(config, 5) == found[:5]
    with pytest.raises(UserError, match=r"row 1 has no .id., which data\.id=id names; it has frage, gold, nr"):
        problems_of_set(SetConfig(config.source, question="frage", answer="gold", id="id"), 0)


def test_a_set_without_ids_is_the_same_wherever_its_file_is(tmp_path):
    rows = [{"problem": asked, "answer": answer} for asked, answer in QUESTIONS]
    here, there = (problems_of_set(SetConfig(write(tmp_path / name, rows)), 0) for name in ("a.jsonl", "b.jsonl"))
    assert [problem.id for problem in here] == [f"row {i}" for i in range(1, len(QUESTIONS) + 1)]
    assert digest_of(here) == digest_of(there)


def test_the_miniatures_set_is_as_long_as_is_asked_for():
    found = problems_of_set(SetConfig(split="dev"), 3)
    assert found == Problems("arithmetic", "dev", 5).head(3)
    with pytest.raises(UserError, match=r"data\.source=arithmetic has no end; set evaluation\.problems"):
        problems_of_set(SetConfig(), 0)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("yentinglin/aime_2025", "aime_2025"),
        ("HuggingFaceH4/MATH-500:test", "math-500"),
        ("openai/gsm8k:main/test", "gsm8k"),
        ("tfds:gsm8k/test", "gsm8k"),
        ("/data/v1.0/My set.dev.jsonl", "my_set.dev"),
    ],
)
def test_a_set_is_called_what_the_recipes_dashboards_call_it(monkeypatch, source, name):
    monkeypatch.setattr("retool_jax.data.problems.read_rows", lambda *_: rows_of(1))
    assert Problems(source, "dev", 0).name == name


def test_what_is_made_here_is_called_by_its_split():
    assert [Problems("arithmetic", split, 0).name for split in ("dev", "test")] == ["dev", "test"]
