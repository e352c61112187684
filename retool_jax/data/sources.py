"""Read rows as dicts from JSONL, JSON and parquet files, the Hugging Face hub and TensorFlow Datasets."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retool_jax.errors import UserError, one_line
from retool_jax.sandbox.text import encodable
from retool_jax.shapes import map_leaves

PARQUET_ROWS = 1024  # that are in memory at the same time
FORMS = "a JSONL or parquet file, a hub id"  # for error messages; the caller adds its own sources, like `arithmetic`


def read_rows(source: str, others: str = "") -> Iterable[dict]:
    """All rows of a source, in its order. The result has a length and can be iterated again.

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file; `tfds:NAME/SPLIT`; or a hub id, whose split is `train` unless it
            is written as `ID:SPLIT` or `ID:CONFIG/SPLIT`, as in `openai/gsm8k:main/test`.
        others: other sources that the caller accepts, for error messages: ", or arithmetic".

    Raises:
        UserError: there is no such source, or it cannot be read.
    """
    suffix = Path(source).suffix.lower()
    if source.startswith("tfds:"):
        return _tensorflow_rows(source)
    if suffix not in (".jsonl", ".json", ".parquet"):
        name, _, part = source.partition(":")
        config, _, split = part.rpartition("/")
        if not name.strip("/ "):
            raise UserError(f"no data are named by {source!r}; give {FORMS}{others}")
        if Path(source).is_file():
            raise UserError(
                f"cannot read data {source}: its name ends in none of .jsonl, .json and .parquet; write it in one"
                " of these forms, or rename it if it has one"
            )
        return _load_dataset(source, others, name, config or None, split or "train")
    if not Path(source).is_file():
        raise UserError(f"no data file {source}; give {FORMS}{others}")
    if suffix == ".parquet":
        return _parquet_rows(source, others)
    # Not with `datasets`: it gives every row the columns of all rows, even inside a call's arguments.
    return _json_rows(source, others, whole=suffix == ".json")


def _json_rows(source: str, others: str, whole: bool) -> list[dict]:
    """The objects on the lines of a file; with `whole` also a file that is one list, or one object on several lines."""
    rows: list[dict] = []
    where = ""
    try:
        if whole and (rows := _one_json(Path(source).read_text(encoding="utf-8-sig"))):
            return rows
        with open(source, encoding="utf-8-sig") as file:  # some programs write a byte order mark first
            for number, line in enumerate(file, start=1):
                where = f"line {number}: "
                if line.strip():
                    rows.append(_loaded(line))
                    if not isinstance(rows[-1], dict):
                        raise ValueError("a row is not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise _unreadable(source, others, f"{where}{error}") from error
    return rows


def _one_json(text: str) -> list[dict]:
    """The rows of a text that is one JSON value; empty if it is not, for example with an object on each line."""
    if text.lstrip().startswith("["):
        rows = _loaded(text)
    else:
        try:
            rows = [_loaded(text)]
        except ValueError:
            return []
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is not an object")
    return rows


def _loaded(text: str) -> Any:
    """A JSON value whose texts can be encoded: half of a surrogate pair is replaced by its escape."""
    value = json.loads(text)
    if r"\ud" not in text.lower():
        return value
    return map_leaves(lambda leaf: encodable(leaf) if isinstance(leaf, str) else leaf, value)


@dataclass(frozen=True)
class _ParquetRows:
    """The rows of a file, read anew each time. `datasets` would copy them into its cache first."""

    source: str
    others: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        import pyarrow.parquet as pq

        batches = pq.ParquetFile(self.source).iter_batches(PARQUET_ROWS)
        while True:
            try:
                rows = next(batches).to_pylist()
            except StopIteration:
                return
            except Exception as error:  # pyarrow raises several kinds
                raise _unreadable(self.source, self.others, error) from error
            yield from map(_plain, rows)


def _parquet_rows(source: str, others: str) -> Iterable[dict]:
    import pyarrow.parquet as pq  # slow to import, and not needed for JSONL and the miniature

    try:
        return _ParquetRows(source, others, pq.read_metadata(source).num_rows)
    except Exception as error:  # pyarrow raises several kinds for a file that is not parquet
        raise _unreadable(source, others, error) from error


def _load_dataset(source: str, others: str, name: str, config: str | None, split: str) -> Iterable[dict]:
    import datasets  # slow to import, and not needed for JSONL and the miniature

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs each error before it raises it
    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the library raises dozens of kinds, most of them caused by a clearer one
        raise _unreadable(source, others, error.__cause__ or error) from error


def _tensorflow_rows(source: str) -> list[dict]:
    """Rows of a prepared or downloadable TensorFlow data set, read without TensorFlow itself."""
    name, _, split = source.removeprefix("tfds:").rpartition("/")
    if not name or not split:
        raise UserError(f"cannot read data {source}; write tfds:NAME/SPLIT, for example tfds:math_qa/train")
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError(
            f"{source} needs the package tensorflow-datasets ({error}); install retool_jax[tfds]"
        ) from error
    try:
        return [_plain(row) for row in tensorflow_datasets.data_source(name, split=split)]
    except Exception as error:  # any kind
        raise UserError(f"cannot read data {source} ({one_line(error)}); check the name and the split") from error


def _plain(value: object) -> object:
    """A value with bytes as text, which some writers such as Spark store, and arrays as lists, at any depth."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _unreadable(source: str, others: str, cause: object) -> UserError:
    return UserError(f"cannot read data {source} ({one_line(cause)}); give {FORMS}{others}")
