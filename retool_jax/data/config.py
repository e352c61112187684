"""What a run may set of its problems."""

from typing import Literal

from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED

MADE_HERE = ("arithmetic", "word_problems")  # sources whose problems are made as they are asked for, without an end
HELD_OUT = "word_problems:held_out"


def check_source(key: str, source: str, held_out: bool = True) -> None:
    """A `UserError` where a source has the name of one that is made here and is none: the hub would be asked for it."""
    name, mark, _ = source.partition(":")
    if name in MADE_HERE and mark and not (held_out and source == HELD_OUT):
        known = (*MADE_HERE, HELD_OUT) if held_out else MADE_HERE
        raise UserError(f"{key}={source} is none of what is made here: {', '.join(known)}")


def check_trained(key: str, source: str) -> None:
    """A `UserError` where a run would learn from problems that are kept for tests."""
    if source == HELD_OUT:
        raise UserError(f"{key}={source}: these kinds are kept out of training; use {key}=word_problems")


@dataclass(frozen=True, config=CHECKED)
class DataConfig:
    """Where problems come from: made here, a JSONL or parquet file, a data set id of the hub, `tfds:NAME/SPLIT`."""

    train: str = "arithmetic"
    """Or word_problems, a JSONL or parquet file, a hub id, tfds:NAME/SPLIT; a published set is best cleaned by
    `python -m retool_jax.prepare` first."""
    dev: str = "arithmetic"  # looked at while tuning
    test: str = "arithmetic"
    """Looked at once, for the final table; word_problems:held_out has kinds that are not trained."""

    def __post_init__(self) -> None:
        check_trained("data.train", self.train)
        for key in ("train", "dev", "test"):
            check_source(f"data.{key}", getattr(self, key))
        if self.train == self.test and self.train not in MADE_HERE:  # whose splits share nothing
            raise UserError(
                f"data.train={self.train} is data.test, too, which would measure what was learned by heart; train on"
                " another set, or leave data.test to one that is not trained"
            )


@dataclass(frozen=True, config=CHECKED)
class SetConfig:
    """The problems that an evaluation asks, and what a set of one's own calls its columns."""

    source: str = "arithmetic"
    """Or word_problems, word_problems:held_out, a JSONL or parquet file, a hub id as ID:SPLIT or ID:CONFIG/SPLIT, or
    tfds:NAME/SPLIT."""
    split: Literal["dev", "test"] = "test"  # of what is made here; other sources say theirs themselves
    question: str = ""  # the column that asks; empty: those that published sets have (docs/data.md)
    answer: str = ""  # the column with the answer that scores; empty: as above
    id: str = ""  # the column that names a problem; empty: as above, or its place in the set

    def __post_init__(self) -> None:
        check_source("data.source", self.source)
        made = self.source.partition(":")[0] in MADE_HERE
        if not made and self.split != SetConfig.split:
            raise UserError(
                f"data.split={self.split} is of problems that are made here, and data.source={self.source} says its"
                " own, as ID:SPLIT; leave data.split out"
            )
        if made and (named := [key for key in ("question", "answer", "id") if getattr(self, key)]):
            raise UserError(
                f"data.{named[0]}={getattr(self, named[0])} is a column, and data.source={self.source}, which is made"
                " here, has none; leave it out"
            )
