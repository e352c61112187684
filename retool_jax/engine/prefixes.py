"""Rows of conversations that have ended, kept for those that go on from them: their pages need not be written again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Parked

_ID = 4  # bytes of an id


class Kept(NamedTuple):
    """A row without a conversation."""

    ids: bytes  # int32 [S]: what it holds; bytes compare much faster than arrays of this size
    parked: Parked


class Prefixes:
    """At most `engine.prefix_tokens` tokens of rows, of which the least recently used go first.

    All of them are of the engine's present weights: whoever keeps a row sees to that, and clears when new ones come.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._limit = engine.config.prefix_tokens
        self._rows: list[Kept] = []  # the most recently used last

    def keep(self, ids: Sequence[int], parked: Parked) -> None:
        """Take a row over, in the place of those that it begins with; one above the limit is let go."""
        if len(ids) > self._limit:
            self._engine.drop(parked)
            return
        new = _bytes(ids)
        for row in [row for row in self._rows if new.startswith(row.ids)]:
            self._drop(row)
        self._rows.append(Kept(new, parked))
        while sum(len(row.ids) for row in self._rows) > self._limit * _ID:
            self.drop_oldest()

    def share(self, prompt: Sequence[int]) -> Parked | None:
        """Another holder of the tokens that a prompt begins with, but for its last, whose writing brings the hidden
        state along; None where no row has a page of them."""
        if not self._rows:
            return None
        wanted, best, length = _bytes(prompt[:-1]), None, 0
        for row in reversed(self._rows):
            begins = wanted[: (length + 1) * _ID]  # of a row that has more of them
            if len(begins) > length * _ID and row.ids.startswith(begins):
                best, length = row, _common(row.ids, wanted)
        if best is None or length < self._engine.sizes.page_size:
            return None
        self._rows = [*(row for row in self._rows if row is not best), best]
        return self._engine.share(best.parked, length)

    def drop_oldest(self) -> bool:
        """Let go of the row that was not used for longest; False where there is none."""
        if self._rows:
            self._drop(self._rows[0])
            return True
        return False

    def clear(self) -> None:
        while self.drop_oldest():
            pass

    def _drop(self, row: Kept) -> None:
        self._rows = [other for other in self._rows if other is not row]
        self._engine.drop(row.parked)


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _common(a: bytes, b: bytes) -> int:
    """How many ids both begin with."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(np.frombuffer(a[:least], np.int32) != np.frombuffer(b[:least], np.int32))
    return int(differ[0]) if len(differ) else least // _ID
