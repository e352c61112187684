"""What a run may set of its problems."""

from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED


@dataclass(frozen=True, config=CHECKED)
class DataConfig:
    """Where problems come from: made here, a JSONL or parquet file, a data set id of the hub, `tfds:NAME/SPLIT`."""

    train: str = "arithmetic"
    """Or word_problems, word_problems:held_out, a JSONL or parquet file, a hub id, tfds:NAME/SPLIT; a published set is
    best cleaned by `python -m retool_jax.prepare` first."""
    dev: str = "arithmetic"  # looked at while tuning
    test: str = "arithmetic"  # looked at once, for the final table
