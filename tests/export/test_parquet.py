"""The table has typed columns, keeps every value, and is written in groups."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool_jax.errors import UserError
from retool_jax.export import parquet
from retool_jax.export.command import main
from retool_jax.export.records import Record, Selection, read_records


def test_a_table_holds_what_the_records_hold(run, tmp_path):
    main([f"run={run}", f"out={tmp_path / 'all.parquet'}"])
    table = pq.read_table(tmp_path / "all.parquet")
    assert table.schema.equals(parquet.SCHEMA) and table.num_rows == 8
    for row, record in zip(table.to_pylist(), read_records(run, Selection()), strict=True):
        values = record.values
        assert row["ids"] == values["ids"] and row["sampled"] == [bool(one) for one in values["sampled"]]
        assert row["logprobs"] == pytest.approx(values["logprobs"])
        same = ("id", "split", "step", "group", "answer", "correct", "reward", "end", "fault", "turns", "segments")
        assert {key: row[key] for key in same} == {key: values[key] for key in same}
        assert json.loads(row["reward_terms"]) == values["reward_terms"] and row["extra"] == "{}"
        assert [call["output"] for call in row["tool_calls"]] == ["408", "408.0", "no JSON"]
        assert [json.loads(call["metrics"]) for call in row["tool_calls"]] == [
            call["metrics"] for call in values["tool_calls"]
        ]
    assert [row["reward"] for row in table.to_pylist()].count(None) == 2
    assert not list(tmp_path.glob("*.tmp"))


def test_the_library_of_data_sets_reads_it(run, tmp_path):
    main([f"run={run}", f"out={tmp_path / 'all.parquet'}", "step=5", "greedy=false"])
    from datasets import Dataset  # which imports PyTorch

    rows = Dataset.from_parquet(str(tmp_path / "all.parquet"), cache_dir=str(tmp_path / "cache"))
    assert rows["source"] == ["dev-000005"] * 2 and rows[0]["messages"][0]["content"] == "12*34?"


def test_hostile_texts_and_numbers_come_through(hostile, tmp_path):
    main([f"run={hostile}", f"out={tmp_path / 'x.parquet'}"])
    (row,) = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert row["tool_calls"][0]["output"].startswith("a\x00b") and row["problem"] == "lone \\udfff surrogate"
    assert row["ground_truth"] == "6" and row["logprobs"][-1] == float("-inf") and row["group"] is None
    assert json.loads(row["extra"]) == {"sample": 3, "set": {"name": "x"}}


def test_rows_leave_memory_in_groups(run, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "TOKENS_PER_GROUP", 300)
    main([f"run={run}", f"out={tmp_path / 'x.parquet'}"])
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert file.num_row_groups > 2 and file.metadata.num_rows == 8


def test_a_value_of_another_type_is_told(run):
    first = next(read_records(run, Selection()))
    strange = Record(first.source, first.values | {"group": "first"})
    with pytest.raises(UserError, match=r"trajectories 1 to 2 hold what the table cannot .*; choose others"):
        parquet.write([first, strange], pa.BufferOutputStream())
