"""Trajectories as a table with typed columns."""

from collections.abc import Iterable
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from retool_jax.errors import UserError, one_line
from retool_jax.export.records import Record, conversation, to_json

TOKENS_PER_GROUP = 500_000  # of a group of rows, which is in memory before it is written

_USE = {"turn": pa.int32(), "tool": pa.string(), "code": pa.string(), "status": pa.string(), "output": pa.string()}
_USE |= {"wall_s": pa.float64(), "queue_s": pa.float64(), "repaired": pa.string(), "metrics": pa.string()}
_CALL = {"id": pa.string(), "name": pa.string(), "arguments": pa.string()}
_MESSAGE = {"role": pa.string(), "content": pa.string(), "reasoning": pa.string(), "calls": pa.list_(pa.struct(_CALL))}
_SEGMENT = {"role": pa.string(), "start": pa.int32(), "stop": pa.int32(), "text": pa.string()}
COLUMNS = {
    "id": pa.string(),
    "source": pa.string(),  # the name of its file without the suffix
    "split": pa.string(),
    "step": pa.int64(),
    "group": pa.int64(),
    "prompt_id": pa.string(),
    "problem": pa.string(),
    "ground_truth": pa.string(),
    "answer": pa.string(),
    "correct": pa.bool_(),
    "exact_match": pa.bool_(),
    "verdict": pa.string(),
    "reward": pa.float64(),
    "reward_terms": pa.string(),  # JSON, like other values whose keys differ between runs
    "end": pa.string(),
    "fault": pa.string(),
    "forced": pa.bool_(),
    "turns": pa.int32(),
    "prompt_tokens": pa.int32(),
    "response_tokens": pa.int32(),
    "ids": pa.list_(pa.int32()),
    "sampled": pa.list_(pa.bool_()),
    "logprobs": pa.list_(pa.float32()),
    "messages": pa.list_(pa.struct(_MESSAGE | {"call_id": pa.string()})),
    "segments": pa.list_(pa.struct(_SEGMENT)),
    "tool_calls": pa.list_(pa.struct(_USE)),
    "timings": pa.struct({"started_s": pa.float64(), "finished_s": pa.float64()}),
    "extra": pa.string(),  # JSON of every other key of the record
}
SCHEMA = pa.schema(COLUMNS)
OWN = ("source", "messages", "extra")  # columns that are not keys of a record


def row_of(record: Record) -> dict:
    """A record as a row of the table; missing values are null."""
    values = record.values
    row = {key: values.get(key) for key in COLUMNS} | {
        "source": record.source,
        "reward_terms": to_json(values.get("reward_terms", {})),
        "sampled": [bool(one) for one in values["sampled"]],
        "messages": list(conversation(values)),
        "tool_calls": [use | {"metrics": to_json(use.get("metrics", {}))} for use in values["tool_calls"]],
        "extra": to_json({key: value for key, value in values.items() if key not in COLUMNS or key in OWN}),
    }
    for key in ("prompt_id", "problem", "ground_truth", "answer"):  # a data set may have numbers for them
        row[key] = row[key] if row[key] is None or isinstance(row[key], str) else to_json(row[key])
    return row


def write(records: Iterable[Record], file: BinaryIO) -> int:
    """Write the table, one group of rows after the other, and return the number of rows.

    Raises:
        UserError: a record has a value of another type than its column.
    """
    count, rows, tokens = 0, [], 0
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:

        def flush() -> None:
            try:
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
            except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
                raise UserError(
                    f"trajectories {count - len(rows) + 1} to {count} hold what the table cannot ({one_line(error)});"
                    " choose others with split= and step=, or format=atif"
                ) from error
            rows.clear()

        for record in records:
            rows.append(row_of(record))
            count, tokens = count + 1, tokens + len(record.values["ids"])
            if tokens >= TOKENS_PER_GROUP:
                flush()
                tokens = 0
        if rows:
            flush()
    return count
