"""Sequences of different lengths to packed rows of one length, without a token changing its meaning.

Several sequences share a row; `segments` tells them apart for attention, and positions start at 0 in each. A
token's place in the batch never changes its loss, so packing is only about not computing on padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from retool_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """One sequence to learn from; every list has one entry per token.

    `sampled` marks what the policy drew (or is to imitate); `logprobs` are those at sampling time, 0 elsewhere;
    `advantage` holds for all sampled tokens.
    """

    ids: Sequence[int]
    sampled: Sequence[bool]
    logprobs: Sequence[float] = field(default=())
    advantage: float = 1.0


class PackedBatch(NamedTuple):
    """Arrays [M,B,T] of M micro-batches of B rows; only the first `micro_batches` of them hold tokens."""

    tokens: np.ndarray  # int32
    positions: np.ndarray  # int32, from 0 in each segment
    segments: np.ndarray  # int32, 0 is padding
    sampled: np.ndarray  # bool: the loss covers these tokens and no others
    logprobs: np.ndarray  # float32, of sampled tokens when they were sampled
    advantages: np.ndarray  # float32
    micro_batches: np.ndarray  # int32 scalar


def first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Rows of indices, longest first into the first row with room (first-fit decreasing)."""
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] > row_length:
            raise UserError(
                f"a sequence of {lengths[index]} tokens does not fit a packed row of {row_length};"
                " raise sft.row_length or rl.row_length"
            )
        place = next((r for r, left in enumerate(room) if left >= lengths[index]), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(row_length)
        rows[place].append(index)
        room[place] -= lengths[index]
    return rows


def pack(
    examples: Sequence[Example], row_length: int, rows_per_micro: int, max_micro_batches: int | None = None
) -> PackedBatch:
    """Pack examples into rows of `row_length`, and rows into micro-batches.

    `max_micro_batches` fixes M so that one compiled update serves every batch; the update stops after those in use.
    """
    rows = first_fit([len(example.ids) for example in examples], row_length)
    used = -(-len(rows) // rows_per_micro)
    count = used if max_micro_batches is None else max_micro_batches
    if used > count:
        raise UserError(
            f"{len(rows)} packed rows need {used} micro-batches of {rows_per_micro}; the limit is {count};"
            " use longer rows, or fewer tokens per step"
        )
    shape = (count * rows_per_micro, row_length)
    batch = PackedBatch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        sampled=np.zeros(shape, bool),
        logprobs=np.zeros(shape, np.float32),
        advantages=np.zeros(shape, np.float32),
        micro_batches=np.int32(used),
    )
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, start=1):
            example = examples[index]
            span = slice(start, start + len(example.ids))
            sampled = np.asarray(example.sampled, bool)
            batch.tokens[row, span] = example.ids
            batch.positions[row, span] = np.arange(len(example.ids))
            batch.segments[row, span] = segment
            batch.sampled[row, span] = sampled
            if len(example.logprobs):
                batch.logprobs[row, span] = example.logprobs
            batch.advantages[row, span] = np.where(sampled, example.advantage, 0.0)
            start = span.stop
    return PackedBatch(*(x.reshape(count, rows_per_micro, row_length) for x in batch[:-1]), batch.micro_batches)
