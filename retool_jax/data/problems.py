"""Problems to learn from: rows in the columns of DAPO-Math-17k, from the miniature, a file or the hub."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retool_jax.data import arithmetic
from retool_jax.errors import UserError


@dataclass(frozen=True)
class DataConfig:
    """Where problems come from: `arithmetic`, a JSONL or parquet file, or a data set id of the hub."""

    train: str = "arithmetic"
    dev: str = "arithmetic"  # looked at while tuning
    test: str = "arithmetic"  # looked at once, for the final table


@dataclass(frozen=True)
class Problem:
    """A question as chat messages, and the answer that scores."""

    id: str
    messages: tuple[dict, ...]
    ground_truth: str

    @property
    def question(self) -> str:
        return self.messages[-1]["content"]


class Problems:
    """An endless, reproducible stream: position i holds the same problem in every run with this seed.

    A finite data set is repeated, the train split in a new order each epoch; the miniature never repeats.
    """

    def __init__(self, source: str, split: str, seed: int) -> None:
        self.split = split
        self._seed = seed
        self.finite = None if source == "arithmetic" else load_problems(source)

    def __getitem__(self, index: int) -> Problem:
        if self.finite is None:
            row = arithmetic.problem_row(self.split, index, self._seed)
            return to_problem(row, f"arithmetic {self.split} {index}")
        epoch, position = divmod(index, len(self.finite))
        if self.split == "train":
            position = np.random.default_rng([self._seed, epoch]).permutation(len(self.finite))[position]
        return self.finite[position]

    def head(self, count: int) -> list[Problem]:
        """The first `count` problems, or all of a smaller data set."""
        return [self[i] for i in range(count if self.finite is None else min(count, len(self.finite)))]


def load_problems(source: str) -> list[Problem]:
    """All rows of a JSONL or parquet file, or of the `train` split of a hub data set, checked."""
    import datasets  # slow to import, and the miniature does not need it

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(source).suffix)
    if kind and not Path(source).is_file():
        raise UserError(f"no data file {source}; give a JSONL or parquet file, a hub id, or arithmetic")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs each error before it raises it
    try:
        if kind:
            rows = datasets.load_dataset(kind, data_files=source, split="train")
        else:
            rows = datasets.load_dataset(source, split="train")
    except Exception as error:  # the library raises dozens of kinds, most of them on top of the one that tells
        cause = error.__cause__ or error
        raise UserError(
            f"cannot read data {source} ({' '.join(str(cause).split())[:200]});"
            " give a JSONL or parquet file, a hub id, or arithmetic"
        ) from error
    problems: dict[str, Problem] = {}
    ordered = []
    for number, row in enumerate(rows, start=1):
        problem = to_problem(row, f"{source} row {number}")
        if problems.setdefault(problem.id, problem) != problem:
            raise UserError(
                f"{source} row {number} has the extra_info.index {problem.id!r} of another problem; make them unique"
            )
        ordered.append(problem)
    if not ordered:
        raise UserError(f"data {source} has no rows; give at least one problem")
    return ordered


def to_problem(row: dict, where: str) -> Problem:
    """One row with DAPO's `prompt`, `reward_model.ground_truth` and `extra_info.index`; `where` is for errors."""
    for column in ("prompt", "reward_model"):
        if column not in row:
            raise UserError(f"{where} has no column {column!r}; it has {', '.join(sorted(row))}")
    reward, extra = ({} if row.get(key) is None else row[key] for key in ("reward_model", "extra_info"))
    if not isinstance(reward, dict) or not isinstance(extra, dict):
        raise UserError(f"{where}: reward_model and extra_info must be objects, as {{'ground_truth': '34'}}")
    answer = "" if reward.get("ground_truth") is None else str(reward["ground_truth"]).strip()
    if not answer:
        raise UserError(f"{where} has an empty reward_model.ground_truth; every problem needs an answer")
    prompt = row["prompt"]
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(isinstance(m, dict) and _is_text(m.get("role"), m.get("content")) for m in messages):
        raise UserError(f"{where} has no usable prompt; expected a list of messages with role and content, not empty")
    index = extra.get("index")
    return Problem(
        where if index is None else str(index),
        tuple({"role": m["role"], "content": m["content"]} for m in messages),
        answer,
    )


def _is_text(*values: object) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
