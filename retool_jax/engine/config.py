"""Sizes of an engine: what a run may set, what that comes to, and how writes are cut into calls of compiled sizes."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, Count, Positive

CALL_TOKENS = 4096  # padded tokens of a call up to which fewer rows are not worth a size of their own


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
    stale_rows: Literal["rewrite", "discard", "keep"] = "rewrite"
    """When weights change under a conversation: rewrite its row, discard it, or keep what the old weights wrote."""
    page_size: Count = 0  # tokens of a page; 0: 128 where a kernel reads pages one by one (TPU), 16 elsewhere
    pages: Count = 0  # pages of the cache, shared by all rows; 0: enough for every slot's max_length
    tp: Count = 0
    """Devices of this process that split a row's heads; 0: the most that divide them and the vocabulary."""
    row_buckets: tuple[Positive, ...] = ()  # rows of a prefill or append; empty: by its tokens, see engine/config.py
    token_buckets: tuple[Positive, ...] = ()  # tokens of a prefill or append; empty: 16, 64, 128, 256, 512, 1024
    read_buckets: tuple[Positive, ...] = ()
    """Tokens of a row that attention reads; empty: powers of two from 256 where no kernel reads only what is there."""


class Sizes(NamedTuple):
    """What an engine's config comes to on a backend; bucket lists ascend, and the last holds everything."""

    page_size: int
    pages: int
    rows: tuple[tuple[int, ...], ...]  # of a call, for each size in `tokens`
    tokens: tuple[int, ...]
    reads: tuple[int, ...]  # in pages


def sizes(config: EngineConfig, kernel: str) -> Sizes:
    """Fill in what the config leaves open for an attention kernel, and cut it to what a row can hold.

    A call has `chunk_rows` rows, or as many as hold `CALL_TOKENS` or a quarter of them. So with the defaults it has 32
    rows of 16, 64 or 128 tokens, 16 or 4 of 256, 8 or 2 of 512, 4 or 1 of 1024: nine shapes for each size in `reads`.
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
