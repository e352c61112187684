"""Settings of the problems of a run or an evaluation."""

from typing import Literal

from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED

MADE_HERE = ("arithmetic", "word_problems")  # sources whose problems are generated on demand, without an end
HELD_OUT = "word_problems:held_out"


def check_source(key: str, source: str, held_out: bool = True) -> None:
    """Raise a `UserError` for an unknown variant of a source that is made here, before the hub is asked for it."""
    name, mark, _ = source.partition(":")
    if name in MADE_HERE and mark and not (held_out and source == HELD_OUT):
        known = (*MADE_HERE, HELD_OUT) if held_out else MADE_HERE
        raise UserError(f"{key}={source} is not made here; choose from: {', '.join(known)}")


def check_trained(key: str, source: str) -> None:
    """Raise a `UserError` if a run would learn from problems that are only for tests."""
    if source == HELD_OUT:
        raise UserError(f"{key}={source}: these kinds are kept out of training; use {key}=word_problems")


@dataclass(frozen=True, config=CHECKED)
class DataConfig:
    """Where problems come from: made here, a JSONL or parquet file, a hub id of a data set, or `tfds:NAME/SPLIT`."""

    train: str = "arithmetic"
    """Or word_problems, a JSONL or parquet file, a hub id, tfds:NAME/SPLIT. Clean a published set with
    `python -m retool_jax.prepare` first."""
    dev: str = "arithmetic"  # for tuning
    test: str = "arithmetic"
    """Only for the final table; word_problems:held_out has kinds that are not trained."""

    def __post_init__(self) -> None:
        check_trained("data.train", self.train)
        for key in ("train", "dev", "test"):
            check_source(f"data.{key}", getattr(self, key))
        if self.train == self.test and self.train not in MADE_HERE:  # whose splits share nothing
            raise UserError(
                f"data.train={self.train} is data.test, too, which would measure what was learned by heart; choose"
                " another set for one of them"
            )


@dataclass(frozen=True, config=CHECKED)
class SetConfig:
    """The problems of an evaluation, and the names of their columns."""

    source: str = "arithmetic"
    """Or word_problems, word_problems:held_out, a JSONL or parquet file, a hub id as ID:SPLIT or ID:CONFIG/SPLIT, or
    tfds:NAME/SPLIT."""
    split: Literal["dev", "test"] = "test"  # only for problems that are made here; data.source names other splits
    question: str = ""  # the column with the question; empty: the names that published sets use (docs/data.md)
    answer: str = ""  # the column with the true answer; empty: as above
    id: str = ""  # the column with the problem's id; empty: as above, or the row number

    def __post_init__(self) -> None:
        check_source("data.source", self.source)
        made = self.source.partition(":")[0] in MADE_HERE
        if not made and self.split != SetConfig.split:
            raise UserError(
                f"data.split={self.split} is of problems that are made here, and data.source={self.source} names its"
                " own, as ID:SPLIT; leave data.split out"
            )
        if made and (named := [key for key in ("question", "answer", "id") if getattr(self, key)]):
            raise UserError(
                f"data.{named[0]}={getattr(self, named[0])} is a column, and data.source={self.source}, which is made"
                " here, has none; leave it out"
            )
