"""What a run may set of the engine."""

from dataclasses import dataclass

from retool_jax.errors import UserError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of the engine, and how its scheduler treats tools.

    Every list of buckets is of compiled sizes, of which the smallest that fits is taken; empty lists are filled in by
    `sizes`. Each size is a program to compile at start.
    """

    slots: int = 192  # B: trajectories that hold a cache row at once
    max_length: int = 128  # S: tokens of one trajectory, prompt and tool output included
    decode_steps: int = 16  # most tokens per row and dispatch
    chunk_rows: int = 32  # most rows per prefill or append call; fewer are padded
    read_late: int = 1  # dispatches that may be under way while the results of an earlier one are read
    tool_lag: int = 1  # decode dispatches between a tool call and its answer's append; -1 appends answers as they come
    stale_rows: str = "rewrite"  # when weights change under a conversation: rewrite its row, or discard it
    page_size: int = 0  # tokens of a page; 0: 128 where a kernel reads pages one by one (TPU), 16 elsewhere
    pages: int = 0  # pages of the cache, shared by all rows; 0: enough for every slot's max_length
    row_buckets: tuple[int, ...] = ()  # rows of a prefill or append; empty: chunk_rows
    token_buckets: tuple[int, ...] = ()  # tokens of a prefill or append; empty: 16, 64, 256, 1024
    read_buckets: tuple[int, ...] = ()  # tokens of a row that attention reads; empty: powers of two from 256 without
    # a kernel, which reads no more than there is

    def __post_init__(self) -> None:
        for name in ("slots", "max_length", "decode_steps", "chunk_rows"):
            if getattr(self, name) < 1:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 1")
        if self.tool_lag < -1:
            raise UserError(f"engine.tool_lag={self.tool_lag} must be -1 (answers as they come) or at least 0")
        if self.stale_rows not in ("rewrite", "discard"):
            raise UserError(f"engine.stale_rows={self.stale_rows} is not one of: rewrite, discard")
        for name in ("page_size", "pages", "read_late"):
            if getattr(self, name) < 0:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 0")
        for name in ("row_buckets", "token_buckets", "read_buckets"):
            if any(size < 1 for size in getattr(self, name)):
                raise UserError(f"engine.{name}={list(getattr(self, name))} must be sizes of at least 1")
