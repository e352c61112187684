"""Sizes of an engine: the config, the sizes that follow from it, and how writes are cut into calls of these sizes."""

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from retool_jax.errors import UserError
from retool_jax.fields import CHECKED, MOST, Count, Positive

CALL_TOKENS = 2048  # the most tokens of a call; longer writes take several calls
FILLED = 0.75  # the least share of a block that tokens fill; fewer tokens go into smaller blocks
Rows = Annotated[int, Field(ge=1, le=1 << 16)]
Length = Annotated[int, Field(ge=1, le=1 << 24)]
Late = Annotated[int, Field(ge=0, le=64)]


@dataclass(frozen=True, config=CHECKED)
class EngineConfig:
    """Sizes of the engine, and how its scheduler treats tools.

    The buckets are lists of compiled sizes; `sizes` fills in empty lists. Each pair of a size in `token_buckets` and
    one in `read_buckets` is a program to compile at start.
    """

    slots: Rows = 192  # B: trajectories that hold a cache row at the same time
    max_length: Length = 128  # S: tokens of one trajectory, prompt and tool output included
    decode_steps: Annotated[int, Field(ge=1, le=1 << 16)] = 16  # most tokens per row and dispatch
    chunk_tokens: Annotated[int, Field(ge=0, le=1 << 20)] = 0
    """Tokens of prompts and tool answers that go through the model at once; 0: 64 on a CPU, else 128, for which reading
    the weights takes longer than computing."""
    read_late: Late = 1  # dispatches that may be in flight while the results of an earlier one are read
    tool_lag: Annotated[int, Field(ge=-1, le=MOST)] = 1
    """Decode dispatches between a tool call and its answer's append; -1 appends answers as they come."""
    stale_rows: Literal["rewrite", "discard", "keep"] = "rewrite"
    """When weights change during a conversation: rewrite its row, discard it, or keep what the old weights wrote."""
    page_size: Count = 0  # tokens of a page; 0: 128 (TPU) or 64 (GPU) with a kernel that reads pages, 16 otherwise
    pages: Count = 0
    """Pages of the cache, shared by all rows; 0: enough for every slot's max_length, and for prefix_tokens."""
    prefix_tokens: Count = 0
    """Tokens of ended conversations whose pages are kept for conversations that continue them; 0: none."""
    tp: Count = 0
    """Devices of this process that split a row's heads; 0: the most that divide the heads and the vocabulary."""
    token_buckets: tuple[Positive, ...] = ()
    """Tokens of the blocks in which texts are written; empty: 4 and 16, or 32 with the TPU's kernel."""
    read_buckets: tuple[Positive, ...] = ()
    """Lengths of a row that attention reads; empty: powers of two from 256, or max_length with the TPU's kernel."""


class Sizes(NamedTuple):
    """The sizes of an engine on a backend; buckets are in ascending order."""

    page_size: int
    pages: int
    tokens: tuple[int, ...]  # of a block
    rows: tuple[int, ...]  # blocks of a call, for each size in `tokens`
    at_once: tuple[int, ...]  # blocks that go through the model together, a divisor of `rows`
    reads: tuple[int, ...]  # in pages; the last is a whole row


def sizes(config: EngineConfig, kernel: str, platform: str = "cpu", parts: int = 1) -> Sizes:
    """Fill in the sizes that the config leaves open, for an attention kernel, and limit them to a row's length.

    `parts` is the number of devices over which the blocks of a call are split.
    """
    page_size = min(config.page_size or {"ragged": 128, "triton": 64}.get(kernel, 16), config.max_length)
    row_pages = -(-config.max_length // page_size)

    def up_to(buckets: Iterable[int], last: int) -> tuple[int, ...]:
        return (*sorted({size for size in buckets if size < last}), last)

    given = sorted(config.token_buckets or ((32,) if kernel == "ragged" else (4, 16)))
    tokens = up_to(given, min(given[-1], config.max_length))
    chunk = config.chunk_tokens or (64 if platform == "cpu" else 128)
    at_once = tuple(max(chunk // size, 1) * parts for size in tokens)
    rows = tuple(max(CALL_TOKENS // (size * blocks), 1) * blocks for size, blocks in zip(tokens, at_once, strict=True))
    reads = config.read_buckets or (() if kernel == "ragged" else [256 << i for i in range(16)])
    pages = config.pages or config.slots * row_pages + -(-config.prefix_tokens // page_size)
    if pages < row_pages:
        raise UserError(
            f"engine.pages={pages} of {page_size} tokens do not hold one row of engine.max_length={config.max_length};"
            f" use at least {row_pages}, or 0 for as many as all slots may need"
        )
    return Sizes(
        page_size, pages, tokens, rows, at_once, up_to((-(-length // page_size) for length in reads), row_pages)
    )


def bucket(size: int, buckets: Sequence[int]) -> int:
    """The smallest compiled size that holds `size`."""
    return next(known for known in buckets if known >= size)


class Block(NamedTuple):
    """Consecutive tokens of a text, written as one row of a call."""

    text: int  # index of the text
    start: int  # position of the first token in it
    count: int


class Call(NamedTuple):
    """One call of the model that writes tokens: the index of its size in `Sizes.tokens`, and its blocks."""

    size: int
    blocks: list[Block]


def calls(sizes: Sizes, counts: Sequence[int]) -> list[Call]:
    """The calls that write texts with these numbers of tokens, in the order to make them.

    A text is cut into blocks of the largest size as long as it fills at least `FILLED` of one, then of the next smaller
    size, and so on; blocks of the smallest size may hold fewer. A block sees earlier blocks of its text in the same
    call, since a layer writes keys before it reads them. How a text is cut depends only on its length.
    """
    by_size: list[list[Block]] = [[] for _ in sizes.tokens]
    for text, count in enumerate(counts):
        done = 0
        for size in reversed(range(len(sizes.tokens))):
            tokens = sizes.tokens[size]
            while count - done >= (FILLED * tokens if size else 1):
                by_size[size].append(Block(text, done, min(tokens, count - done)))
                done += by_size[size][-1].count
    return [
        Call(size, blocks[at : at + sizes.rows[size]])
        for size, blocks in reversed(list(enumerate(by_size)))
        for at in range(0, len(blocks), sizes.rows[size])
    ]
