"""Rows of conversations that have ended, kept for those that go on from them: their pages need not be written again."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retool_jax.engine.engine import Engine
from retool_jax.engine.turns import Parked


class Kept(NamedTuple):
    """A row without a conversation."""

    ids: np.ndarray  # int32 [S]: what it holds
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
        new = np.array(ids, np.int32)
        for row in [row for row in self._rows if _common(row.ids, new) == len(row.ids)]:
            self._drop(row)
        self._rows.append(Kept(new, parked))
        while sum(len(row.ids) for row in self._rows) > self._limit:
            self.drop_oldest()

    def share(self, prompt: Sequence[int]) -> Parked | None:
        """Another holder of the tokens that a prompt begins with, but for its last, whose writing brings the hidden
        state along; None where no row has a page of them."""
        if not self._rows:
            return None
        wanted = np.array(prompt[:-1], np.int32)
        length, at = max((_common(row.ids, wanted), at) for at, row in enumerate(self._rows))
        if length < self._engine.sizes.page_size:
            return None
        self._rows.append(row := self._rows.pop(at))
        return self._engine.share(row.parked, length)

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


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many ids both begin with."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(a[:least] != b[:least])
    return int(differ[0]) if len(differ) else least
