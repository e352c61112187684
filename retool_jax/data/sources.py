"""Rows as dicts from wherever they lie: JSONL, JSON and parquet files, the Hugging Face hub, TensorFlow Datasets."""

import json
from collections.abc import Iterable
from pathlib import Path

from retool_jax.errors import UserError, one_line

FORMS = "a JSONL or parquet file, a hub id"  # what error messages offer; the caller adds its own, as `arithmetic`


def read_rows(source: str, others: str = "") -> Iterable[dict]:
    """All rows of a source, in its order; sized, and safe to iterate again.

    Args:
        source: a `.jsonl`, `.json` or `.parquet` file; `tfds:NAME/SPLIT`; or a hub id, whose split is `train` unless it
            is written as `ID:SPLIT` or `ID:CONFIG/SPLIT`, as in `openai/gsm8k:main/test`.
        others: what else the caller accepts, for error messages: ", or arithmetic".

    Raises:
        UserError: nothing there, or it cannot be read.
    """
    suffix = Path(source).suffix
    if source.startswith("tfds:"):
        return _tensorflow_rows(source)
    if suffix not in (".jsonl", ".json", ".parquet"):
        name, _, part = source.partition(":")
        config, _, split = part.rpartition("/")
        return _load_dataset(source, others, name, config or None, split=split or "train")
    if not Path(source).is_file():
        raise UserError(f"no data file {source}; give {FORMS}{others}")
    if suffix == ".parquet":
        return _load_dataset(source, others, "parquet", data_files=source, split="train")
    # Not by `datasets`: it gives every row the columns of all rows, also inside of a call's arguments.
    return _json_rows(source, others)


def _json_rows(source: str, others: str) -> list[dict]:
    rows: list[dict] = []
    where = ""
    try:
        with open(source, encoding="utf-8") as file:
            if source.endswith(".json") and file.read(1) == "[":
                file.seek(0)
                rows = json.load(file)
            else:
                file.seek(0)
                for number, line in enumerate(file, start=1):
                    where = f"line {number}: "
                    if line.strip():
                        rows.append(json.loads(line))
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a row is not an object")
    except (ValueError, OSError, RecursionError) as error:
        raise _unreadable(source, others, f"{where}{error}") from error
    return rows


def _load_dataset(source: str, others: str, *words: str | None, **keys: str) -> Iterable[dict]:
    import datasets  # slow to import, and JSONL and the miniature do not need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs each error before it raises it
    try:
        return datasets.load_dataset(*words, **keys)
    except Exception as error:  # the library raises dozens of kinds, most of them on top of the one that tells
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
    except Exception as error:  # any kind, as above
        raise UserError(f"cannot read data {source} ({one_line(error)}); check the name and the split") from error


def _plain(value: object) -> object:
    """Bytes to text and arrays to lists, in whatever they are nested."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if hasattr(value, "tolist"):  # numpy arrays and scalars
        return _plain(value.tolist())
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _unreadable(source: str, others: str, cause: object) -> UserError:
    return UserError(f"cannot read data {source} ({one_line(cause)}); give {FORMS}{others}")
