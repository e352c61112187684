"""Which row owns which pages of the cache: the host's bookkeeping, without a device.

Rows are any hashable names. A page is shared by every row whose first tokens it holds, and counted: it is free again
when the last of them lets go. Sharing needs no care from anybody: before a row is written to, `ensure` gives it pages
of its own where others hold the same (copy on write).
"""

from collections.abc import Hashable

import numpy as np

from retool_jax.errors import UserError


class OutOfPages(UserError):
    """More tokens were asked for than the cache has free pages; nothing was changed."""


class Pages:
    """Free list, reference counts and page tables of `count` pages with `page_size` tokens each."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))  # the lowest is taken first
        self._holders = [0] * count
        self._rows: dict[Hashable, list[int]] = {}

    @property
    def free_count(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def pages_for(self, length: int) -> int:
        """Pages that hold `length` tokens."""
        return -(-length // self.page_size)

    def needed(self, row: Hashable, start: int, length: int) -> int:
        """Free pages that `ensure` with the same arguments would take."""
        if length <= start:
            return 0
        held = self._rows.get(row, [])
        shared = sum(self._holders[page] > 1 for page in held[start // self.page_size : self.pages_for(length)])
        return shared + max(self.pages_for(length) - len(held), 0)

    def ensure(self, row: Hashable, start: int, length: int) -> list[tuple[int, int]]:
        """Let `row` hold `length` tokens and be the only one that sees positions from `start` on.

        Returns the pages to copy on the device, (source, target), before anything is written: at most one, the page
        that `start` lies in when others share it.

        Raises:
            OutOfPages: there are not enough free pages; the row is as it was.
        """
        if length <= start:
            return []
        needed = self.needed(row, start, length)
        if needed > len(self._free):
            raise OutOfPages(
                f"the cache has {len(self._free)} of {self.count} pages free and row {row!r} needs {needed} more to"
                f" hold {length} tokens ({self.page_size} a page); raise engine.pages, or lower engine.slots or"
                " engine.max_length"
            )
        held = self._rows.setdefault(row, [])
        copies = []
        for index in range(start // self.page_size, self.pages_for(length)):
            if index == len(held):
                held.append(self._take())
            elif self._holders[held[index]] > 1:
                page = self._take()
                if index * self.page_size < start:
                    copies.append((held[index], page))
                self._let_go(held[index])
                held[index] = page
        return copies

    def fork(self, source: Hashable, target: Hashable, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source` by sharing its pages; what it held is let go."""
        shared = self._rows[source][: self.pages_for(length)]
        for page in shared:
            self._holders[page] += 1
        self.free(target)
        self._rows[target] = shared

    def move(self, source: Hashable, target: Hashable) -> None:
        """Give what `source` holds the name `target`, whose own pages are let go."""
        self.free(target)
        if (held := self._rows.pop(source, None)) is not None:
            self._rows[target] = held

    def truncate(self, row: Hashable, length: int) -> None:
        """Let go of the pages behind the first `length` tokens."""
        held = self._rows.get(row, [])
        while len(held) > self.pages_for(length):
            self._let_go(held.pop())

    def free(self, row: Hashable) -> None:
        """Let go of everything that the row holds; a row that holds nothing is fine."""
        self.truncate(row, 0)
        self._rows.pop(row, None)

    def table(self, rows: list[Hashable], width: int) -> np.ndarray:
        """int32 [rows, width]: the first pages of each row; page 0 stands where there is none and is not to be seen."""
        table = np.zeros((len(rows), width), np.int32)
        for at, row in enumerate(rows):
            held = self._rows.get(row, ())[:width]
            table[at, : len(held)] = held
        return table

    def counts(self) -> dict[str, int]:
        """Pages by state, and rows that hold any: a leak is a difference between two quiet moments."""
        return {
            "free": len(self._free),
            "used": self.count - len(self._free),
            "shared": sum(holders > 1 for holders in self._holders),
            "rows": sum(bool(held) for held in self._rows.values()),
        }

    def _take(self) -> int:
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
