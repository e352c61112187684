"""Problems come from files in DAPO's columns, in an order that the seed decides; a bad row is named."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from retool_jax.data.arithmetic import problem_row
from retool_jax.data.problems import Problems, load_problems, to_problem
from retool_jax.errors import UserError

DAPO = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "dapo"


def rows_of(count: int) -> list[dict]:
    return [problem_row("train", index) for index in range(count)]


def write(path: Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
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


def test_the_published_columns_are_understood():
    if not DAPO.is_dir():
        pytest.skip("no sample of DAPO-Math-17k beside this checkout")
    problems = load_problems(str(next(DAPO.glob("*.jsonl"))))
    assert len(problems) == len({problem.id for problem in problems}) > 20
    assert problems[0].ground_truth == "34"
    assert problems[0].question.startswith("Solve the following math problem step by step.")


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
        ({"prompt": "What is 2 + 2?"}, "has no usable prompt"),
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
    """Ids tell prompts apart; the published file repeats whole rows, which is fine."""
    first, second = rows_of(2)
    assert len(load_problems(write(tmp_path / "same.jsonl", [first, second, first]))) == 3
    source = write(tmp_path / "p.jsonl", [first, second | {"extra_info": first["extra_info"]}])
    with pytest.raises(UserError, match=r"row 2 has the extra_info.index 'train-000000' of another problem"):
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
