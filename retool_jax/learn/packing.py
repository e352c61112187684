"""Sequences of different lengths to packed rows of one length, without a token changing its meaning.

Several sequences share a row; `segments` tells them apart for attention, and positions start at 0 in each. A
token's place in the batch never changes its loss, so packing is only about not computing on padding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from retool_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """One sequence to learn from; `ids` and `sampled` have one entry per token.

    `sampled` marks what the policy drew (or is to imitate). `columns` is what the loss is told about those tokens, by
    name: a value for each token of the sequence, or one value for all of them.
    """

    ids: Sequence[int]
    sampled: Sequence[bool]
    columns: Mapping[str, Sequence[float] | float] = field(default_factory=dict)


class Batch(NamedTuple):
    """M micro-batches of B rows of T tokens; only the first `micro_batches` of them hold tokens.

    Inside of a step the same with one micro-batch's [B,T] arrays, and zeros in `columns` where nothing was sampled.
    """

    tokens: np.ndarray  # [M,B,T] int32
    positions: np.ndarray  # [M,B,T] int32, from 0 in each segment
    segments: np.ndarray  # [M,B,T] int32, 0 is padding
    sampled: np.ndarray  # [M,B,T] bool: the loss covers these tokens and no others
    columns: dict[str, np.ndarray]  # [M,B,T] float32 each, 0 where not sampled; "advantages", what a loss asks for
    micro_batches: np.ndarray  # [] int32


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


class Place(NamedTuple):
    """Where an example stands in a batch: [start, stop) of a row of a micro-batch. Segments of a row count from 1."""

    example: int
    micro: int
    row: int
    start: int
    stop: int
    segment: int

    @property
    def at(self) -> tuple[int, int, slice]:
        """Its tokens in an array [M,B,T]."""
        return self.micro, self.row, slice(self.start, self.stop)


def places(lengths: Sequence[int], row_length: int, rows_per_micro: int) -> list[Place]:
    """Where `pack` puts examples of these lengths, row by row."""
    found = []
    for row, members in enumerate(first_fit(lengths, row_length)):
        start = 0
        for segment, index in enumerate(members, start=1):
            stop = start + lengths[index]
            found.append(Place(index, *divmod(row, rows_per_micro), start, stop, segment))
            start = stop
    return found


def pack(
    examples: Sequence[Example], row_length: int, rows_per_micro: int, max_micro_batches: int | None = None
) -> Batch:
    """Pack examples into rows of `row_length`, and rows into micro-batches.

    `max_micro_batches` fixes M so that one compiled step serves every batch; it stops after those in use.

    Raises:
        UserError: an example is longer than a row, or there are more rows than the micro-batches hold.
        ValueError: not all examples have the same columns.
    """
    names = list(examples[0].columns) if examples else []
    if odd := next((example for example in examples if example.columns.keys() != set(names)), None):
        raise ValueError(f"examples have the columns {sorted(names)} and {sorted(odd.columns)}; give all the same ones")
    where = places([len(example.ids) for example in examples], row_length, rows_per_micro)
    rows = where[-1].micro * rows_per_micro + where[-1].row + 1 if where else 0
    used = -(-rows // rows_per_micro)
    count = used if max_micro_batches is None else max_micro_batches
    if used > count:
        raise UserError(
            f"{rows} packed rows need {used} micro-batches of {rows_per_micro}; the limit is {count};"
            " use longer rows, or fewer tokens per step"
        )
    shape = (count, rows_per_micro, row_length)
    batch = Batch(
        tokens=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
        segments=np.zeros(shape, np.int32),
        sampled=np.zeros(shape, bool),
        columns={name: np.zeros(shape, np.float32) for name in names},
        micro_batches=np.int32(used),
    )
    for place in where:
        example, at = examples[place.example], place.at
        batch.tokens[at] = example.ids
        batch.positions[at] = np.arange(len(example.ids))
        batch.segments[at] = place.segment
        batch.sampled[at] = example.sampled
        for name, values in example.columns.items():
            batch.columns[name][at] = np.where(example.sampled, values, 0.0)
    return batch
