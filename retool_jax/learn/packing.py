"""Pack sequences of different lengths into rows of one length.

Several sequences share a row; `segments` tells them apart for attention, and positions start at 0 in each. The place
of a token in the batch does not change its loss: packing only avoids computing on padding, and, with shared prefixes,
computes a prompt once for all its samples in a row:

    [prompt without its last token] [last token of the prompt, first sample] [last token, second sample] ...

Each of these is a segment. The positions of a sample continue those of the prefix, which tells attention what the
sample sees (`models.attention.seen_keys`). Each sample begins with the prompt's last token, because the token after it
differs.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

import numpy as np

from retool_jax.errors import UserError


@dataclass(frozen=True)
class Example:
    """One sequence to learn from; `ids` and `sampled` have one entry per token.

    `sampled` marks the tokens that the policy sampled (or shall imitate). `columns` are further inputs of the loss, by
    name: one value for each token of the sequence, or one value for all of them.
    """

    ids: Sequence[int]
    sampled: Sequence[bool]
    columns: Mapping[str, Sequence[float] | float] = field(default_factory=dict)


class Batch(NamedTuple):
    """M micro-batches of B rows of T tokens; only the first `micro_batches` of them hold tokens.

    Inside a step the same type holds the [B,T] arrays of one micro-batch.
    """

    tokens: np.ndarray  # [M,B,T] int32
    positions: np.ndarray  # [M,B,T] int32, from 0 in each segment, or continuing those of its shared prefix
    segments: np.ndarray  # [M,B,T] int32, 0 is padding
    sampled: np.ndarray  # [M,B,T] bool: the loss covers only these tokens
    columns: dict[str, np.ndarray]  # [M,B,T] float32 each, 0 where not sampled: inputs of the loss, like "advantages"
    micro_batches: np.ndarray  # [] int32


def first_fit(
    lengths: Sequence[int], row_length: int, prefixes: Sequence[tuple[int, ...]] | None = None
) -> list[list[int]]:
    """The indices of the sequences in each row; the longest goes first, into the first row with room.

    That is first-fit decreasing. Sequences with the same prefix, which their lengths include, are placed together, and
    the prefix takes room once in a row.
    """
    prefixes = prefixes or [()] * len(lengths)
    groups: dict[Hashable, list[int]] = {}
    for index, prefix in enumerate(prefixes):
        groups.setdefault(prefix or index, []).append(index)
    rows: list[list[int]] = []
    room: list[int] = []
    for group in sorted(groups.values(), key=lambda group: -max(lengths[i] for i in group)):
        have_prefix: set[int] = set()
        for index in sorted(group, key=lambda i: -lengths[i]):
            if lengths[index] > row_length:
                raise UserError(
                    f"a sequence of {lengths[index]} tokens does not fit a packed row of {row_length};"
                    " raise sft.row_length or rl.row_length"
                )
            whole, rest = lengths[index], lengths[index] - len(prefixes[index])
            fits = (r for r, left in enumerate(room) if left >= (rest if r in have_prefix else whole))
            row = next(fits, len(rows))
            if row == len(rows):
                rows.append([])
                room.append(row_length)
            rows[row].append(index)
            room[row] -= rest if row in have_prefix else whole
            have_prefix.add(row)
    return rows


class Place(NamedTuple):
    """Where a piece of an example is in a batch: [start, stop) of a row of a micro-batch.

    The piece is the whole example, a prefix that several examples share in this row, or the tokens after that prefix.
    Segments of a row count from 1.
    """

    example: int
    first: int  # index in the example of the piece's first token
    micro: int
    row: int
    start: int
    stop: int
    segment: int

    @property
    def at(self) -> tuple[int, int, slice]:
        """These tokens in an array [M,B,T]."""
        return self.micro, self.row, slice(self.start, self.stop)

    @property
    def tokens(self) -> slice:
        """These tokens in the example."""
        return slice(self.first, self.first + self.stop - self.start)


def shared_part(example: Example) -> tuple[int, ...]:
    """The ids that an example may share with others: all before its first sampled token, except the last of these."""
    return tuple(example.ids[: max(int(np.argmax(example.sampled)) - 1, 0)])


def places(
    examples: Sequence[Example], row_length: int, rows_per_micro: int, share_prefixes: bool = False
) -> list[Place]:
    """Where `pack` puts examples, row by row."""
    lengths = [len(example.ids) for example in examples]
    rows, prefixes = first_fit(lengths, row_length), [()] * len(lengths)
    if share_prefixes:
        shared = [shared_part(example) for example in examples]
        together = first_fit(lengths, row_length, shared)
        if len(together) < len(rows):
            rows, prefixes = together, shared
    found = []
    for row, members in enumerate(rows):
        start = 0
        for segment, (index, first, last) in enumerate(row_segments(members, lengths, prefixes), start=1):
            stop = start + last - first
            found.append(Place(index, first, *divmod(row, rows_per_micro), start, stop, segment))
            start = stop
    return found


def row_segments(
    members: Sequence[int], lengths: Sequence[int], prefixes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[int, int, int]]:
    """The segments of a row, each an example and the bounds of its tokens: a shared prefix, then its continuations.

    An example that shares its prefix with no other one of the row is one segment.
    """
    for prefix, group in groupby(members, prefixes.__getitem__):
        indices = list(group)
        shared = len(prefix) if len(indices) > 1 else 0
        if shared:
            yield indices[0], 0, shared
        for index in indices:
            yield index, shared, lengths[index]


def pack(
    examples: Sequence[Example],
    row_length: int,
    rows_per_micro: int,
    max_micro_batches: int | None = None,
    share_prefixes: bool = False,
) -> Batch:
    """Pack examples into rows of `row_length`, and rows into micro-batches.

    `max_micro_batches` fixes M, so that one compiled step serves every batch; the step skips the empty ones. With
    `share_prefixes`, examples that begin with the same tokens before the first sampled one share them in a row, if that
    needs fewer rows; attention's kernel must support it (`models.attention.shares_prefixes`).

    Raises:
        UserError: an example is longer than a row, or there are more rows than the micro-batches hold.
        ValueError: not all examples have the same columns.
    """
    names = list(examples[0].columns) if examples else []
    if odd := next((example for example in examples if example.columns.keys() != set(names)), None):
        raise ValueError(f"examples have the columns {sorted(names)} and {sorted(odd.columns)}; give all the same ones")
    where = places(examples, row_length, rows_per_micro, share_prefixes)
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
        example, at, tokens = examples[place.example], place.at, place.tokens
        batch.tokens[at] = example.ids[tokens]
        batch.positions[at] = np.arange(tokens.start, tokens.stop)
        batch.segments[at] = place.segment
        batch.sampled[at] = example.sampled[tokens]
        for name, values in example.columns.items():
            batch.columns[name][at] = np.where(example.sampled, values, 0.0)[tokens]
    return batch
