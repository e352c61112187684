"""The config of the cold start."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.data.config import MADE_HERE, check_source, check_trained
from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, Positive
from retool_jax.learn.config import OptimizerConfig, check_schedule


@dataclass(frozen=True, config=CHECKED)
class SFTConfig:
    """The cold start: imitation of demonstrations."""

    data: str = "arithmetic"  # or word_problems, a JSONL or parquet file, or a hub id, with rows of `messages`
    grammar: Literal["", "hermes", "retool"] = ""
    """How calls are written: hermes, or retool; empty: as in RL's rollout.grammar, else hermes."""
    tool_prompt: str = ""  # like rollout.tool_prompt; a cold start that an RL run makes takes that one
    steps: Count = 1000  # 0 if epochs are set
    epochs: Count = 0  # passes over `data`; each leaves out the rows that do not fill its last step
    batch_tokens: Positive = 2048  # tokens of demonstrations per step, on average
    batch_size: Count = 0  # demonstrations per step; 0: as many as hold batch_tokens on average
    row_length: Positive = 192
    """T of a packed row, and the longest demonstration; a file's rows may be shorter if its longest one is."""
    overlong: Literal["error", "drop"] = "error"
    """What to do with demonstrations longer than row_length: error, or drop. Of generated data the first 256 are
    checked; later ones are replaced, and their number is printed at the end."""
    warmup_fraction: Annotated[float, Field(ge=0, le=0.99)] = 0.0
    """Share of all steps that warm up; the cosine takes the rest. 0: the schedule of sft.optimizer."""
    rows_per_micro: Positive = 4  # B of a micro-batch
    optimizer: OptimizerConfig = OptimizerConfig()

    def __post_init__(self) -> None:
        if bool(self.steps) == bool(self.epochs):
            state = "both set" if self.steps else "both 0"
            raise UserError(
                f"sft.steps={self.steps} and sft.epochs={self.epochs} are {state}; set one of them, and 0 for the other"
            )
        if self.batch_size and self.batch_tokens != SFTConfig.batch_tokens:
            raise UserError(
                f"sft.batch_tokens={self.batch_tokens} is not read with sft.batch_size={self.batch_size}, which says"
                " how many demonstrations a step has; leave one of them out"
            )
        check_trained("sft.data", self.data)
        check_source("sft.data", self.data, held_out=False)
        if self.epochs and self.data in MADE_HERE:
            raise UserError(f"sft.epochs={self.epochs}: sft.data={self.data} has no end; use sft.steps, or other data")
        if not self.warmup_fraction:  # with it there is a cosine
            check_schedule(self.optimizer, "sft.optimizer")
        if self.warmup_fraction and (self.optimizer.warmup_steps or self.optimizer.decay_steps):
            raise UserError(
                f"sft.warmup_fraction={self.warmup_fraction} decides sft.optimizer.warmup_steps and decay_steps; set"
                " both to 0, or sft.warmup_fraction=0"
            )
