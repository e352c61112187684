"""Sizes of an engine: what a run may set, what that comes to, and how writes are cut into calls of compiled sizes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from retool_jax.errors import UserError

CALL_TOKENS = 4096  # padded tokens of a call up to which fewer rows are not worth a size of their own


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
    tp: int = 0  # devices of this process that split a row's heads; 0: the most that divide them and the vocabulary
    row_buckets: tuple[int, ...] = ()  # rows of a prefill or append; empty: by its tokens, see engine/config.py
    token_buckets: tuple[int, ...] = ()  # tokens of a prefill or append; empty: 16, 64, 128, 256, 512, 1024
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
        for name in ("page_size", "pages", "tp", "read_late"):
            if getattr(self, name) < 0:
                raise UserError(f"engine.{name}={getattr(self, name)} must be at least 0")
        for name in ("row_buckets", "token_buckets", "read_buckets"):
            if any(size < 1 for size in getattr(self, name)):
                raise UserError(f"engine.{name}={list(getattr(self, name))} must be sizes of at least 1")


class Sizes(NamedTuple):
    """What an engine's config comes to on a backend; bucket lists ascend, and the last holds everything."""

    page_size: int
    pages: int
    rows: tuple[tuple[int, ...], ...]  # of a call, for each size in `tokens`
    tokens: tuple[int, ...]
    reads: tuple[int, ...]  # in pages


def sizes(config: EngineConfig, kernel: str) -> Sizes:
    """Fill in what the config leaves open for an attention kernel, and cut it to what a row can hold.

    A call of a token size has `chunk_rows` rows where that is at most `CALL_TOKENS` tokens. Where it is more, it has as
    many rows as hold `CALL_TOKENS`, or a quarter of them. So with the defaults a call has 32 rows of 16, 64 or 128
    tokens, 16 or 4 of 256, 8 or 2 of 512, 4 or 1 of 1024: nine shapes for each size in `reads`.
    """
    page_size = min(config.page_size or (128 if kernel == "ragged" else 16), config.max_length)
    row_pages = -(-config.max_length // page_size)

    def up_to(buckets: Iterable[int], last: int) -> tuple[int, ...]:
        return (*sorted({size for size in buckets if size < last}), last)

    def rows_of(tokens: int) -> tuple[int, ...]:
        if config.row_buckets:
            return up_to(config.row_buckets, config.chunk_rows)
        most = max(min(CALL_TOKENS // tokens, config.chunk_rows), 1)
        return up_to(() if most == config.chunk_rows else (max(most // 4, 1),), most)

    given = sorted(config.token_buckets or (16, 64, 128, 256, 512, 1024))
    tokens = up_to(given, min(given[-1], config.max_length))
    reads = config.read_buckets or (() if kernel == "ragged" else [256 << i for i in range(16)])
    pages = config.pages or config.slots * row_pages
    if pages < row_pages:
        raise UserError(
            f"engine.pages={pages} of {page_size} tokens do not hold one row of engine.max_length={config.max_length};"
            f" use at least {row_pages}, or 0 for as many as all slots may need"
        )
    return Sizes(
        page_size,
        pages,
        tuple(rows_of(size) for size in tokens),
        tokens,
        up_to((-(-length // page_size) for length in reads), row_pages),
    )


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest compiled size that holds `size`."""
    return next(known for known in buckets if known >= size)


class Call(NamedTuple):
    """One call of the model that writes tokens: its compiled shape, and which of the given rows it has."""

    rows: int
    tokens: int
    members: list[int]


def calls(sizes: Sizes, counts: Sequence[int]) -> list[Call]:
    """The calls that write these numbers of tokens, one number a row and none above the largest size in `tokens`.

    Token sizes with the row sizes of the smallest one are used as one, so that short rows of unequal lengths share a
    call, in the order given; longer rows share one with rows of their own size.
    """
    shared = sum(rows == sizes.rows[0] for rows in sizes.rows)
    groups: dict[int, list[int]] = {}
    for row, count in enumerate(counts):
        size = sizes.tokens.index(bucket(count, sizes.tokens))
        groups.setdefault(max(size, shared - 1), []).append(row)
    found = []
    for size, left in groups.items():
        while left:
            rows = _row_size(len(left), sizes.rows[size])
            members, left = left[:rows], left[rows:]
            found.append(Call(rows, bucket(max(counts[row] for row in members), sizes.tokens), members))
    return found


def _row_size(rows: int, buckets: tuple[int, ...]) -> int:
    """The rows of the next call for so many: the size that holds them, or a smaller one that does so in two calls."""
    one = next((size for size in buckets if size >= rows), buckets[-1])
    two = next((size for size in buckets if 2 * size >= rows), buckets[-1])
    return two if 2 * two < one else one
