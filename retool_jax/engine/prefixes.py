"""Rows of ended conversations, kept so that conversations which continue them need not write their tokens again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Parked

_ID = 4  # bytes of an id


class KeptRow(NamedTuple):
    """A row that is kept without a conversation."""

    ids: bytes  # int32 [S], its tokens; at this size bytes compare much faster than arrays
    parked: Parked


class Prefixes:
    """Rows of at most `engine.prefix_tokens` tokens together; the least recently used is dropped first.

    All rows must have been written with the engine's current weights. The caller keeps only such rows, and calls
    `clear` when new weights come.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limit = engine.config.prefix_tokens
        self._rows: list[KeptRow] = []  # the most recently used last

    def keep(self, ids: Sequence[int], parked: Parked) -> None:
        """Keep a row, replacing kept rows that are prefixes of it; a row above the limit is dropped."""
        if len(ids) > self._limit:
            self._engine.drop(parked)
            return
        new = _bytes(ids)
        for row in [row for row in self._rows if new.startswith(row.ids)]:
            self._drop(row)
        self._rows.append(KeptRow(new, parked))
        while sum(len(row.ids) for row in self._rows) > self._limit * _ID:
            self.drop_oldest()

    def share(self, prompt: Sequence[int]) -> Parked | None:
        """A parked row with the longest kept prefix of a prompt; None if none has at least a page of it.

        The prompt's last token is never included: writing it yields the hidden state to draw from.
        """
        if not self._rows:
            return None
        wanted, best, length = _bytes(prompt[:-1]), None, 0
        for row in reversed(self._rows):
            longer = wanted[: (length + 1) * _ID]  # a better row begins with this
            if len(longer) > length * _ID and row.ids.startswith(longer):
                best, length = row, _common(row.ids, wanted)
        if best is None or length < self._engine.sizes.page_size:
            return None
        self._rows = [*(row for row in self._rows if row is not best), best]
        return self._engine.share(best.parked, length)

    def drop_oldest(self) -> bool:
        """Drop the least recently used row; False if there is none."""
        if self._rows:
            self._drop(self._rows[0])
            return True
        return False

    def clear(self) -> None:
        while self.drop_oldest():
            pass

    def _drop(self, row: KeptRow) -> None:
        self._rows = [other for other in self._rows if other is not row]
        self._engine.drop(row.parked)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _common(a: bytes, b: bytes) -> int:
    """The length of the common prefix, in ids."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(np.frombuffer(a[:least], np.int32) != np.frombuffer(b[:least], np.int32))
    return int(differ[0]) if len(differ) else least // _ID
