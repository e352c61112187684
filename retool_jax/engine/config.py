"""What a run may set of the engine."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.fields import CHECKED, Count, Positive


@dataclass(frozen=True, config=CHECKED)
class EngineConfig:
    """Sizes of the engine, and how its scheduler treats tools.

    Every list of buckets is of compiled sizes, of which the smallest that fits is taken; empty lists are filled in by
    `sizes`. Each size is a program to compile at start.
    """

    slots: Positive = 192  # B: trajectories that hold a cache row at once
    max_length: Positive = 128  # S: tokens of one trajectory, prompt and tool output included
    decode_steps: Positive = 16  # most tokens per row and dispatch
    chunk_rows: Positive = 32  # most rows per prefill or append call; fewer are padded
    read_late: Count = 1  # dispatches that may be under way while the results of an earlier one are read
    tool_lag: Annotated[int, Field(ge=-1)] = 1
    """Decode dispatches between a tool call and its answer's append; -1 appends answers as they come."""
    stale_rows: Literal["rewrite", "discard"] = "rewrite"
    """When weights change under a conversation: rewrite its row, or discard it."""
    page_size: Count = 0  # tokens of a page; 0: 128 where a kernel reads pages one by one (TPU), 16 elsewhere
    pages: Count = 0  # pages of the cache, shared by all rows; 0: enough for every slot's max_length
    row_buckets: tuple[Positive, ...] = ()  # rows of a prefill or append; empty: chunk_rows
    token_buckets: tuple[Positive, ...] = ()  # tokens of a prefill or append; empty: 16, 64, 256, 1024
    read_buckets: tuple[Positive, ...] = ()
    """Tokens of a row that attention reads; empty: powers of two from 256 where no kernel reads only what is there."""
