"""Which row owns which pages of the cache: bookkeeping on the host.

Rows are named by any hashable objects. Rows with the same first tokens may share pages, which are reference-counted: a
page becomes free when its last holder drops it. Sharing is copy-on-write: before a row is written to, `ensure` replaces
the shared pages that it would write to by pages of its own.
"""

from collections.abc import Hashable

import numpy as np

from retool_jax.errors import UserError


class OutOfPages(UserError):
    """The cache has too few free pages; nothing was changed."""


class Pages:
    """Free list, reference counts and page tables of `count` pages with `page_size` tokens each."""

    def __init__(self, count: int, page_size: int) -> None:
        self.count = count
        self.page_size = page_size
        self._free = list(range(count - 1, -1, -1))  # a stack: the lowest page is taken first
        self._holders = [0] * count
        self._rows: dict[Hashable, list[int]] = {}

    @property
    def free_count(self) -> int:
        """The number of pages that no row holds."""
        return len(self._free)

    def pages_for(self, length: int) -> int:
        """The number of pages for `length` tokens."""
        return -(-length // self.page_size)

    def needed(self, row: Hashable, start: int, length: int) -> int:
        """The number of free pages that `ensure` with the same arguments would take."""
        if length <= start:
            return 0
        held = self._rows.get(row, [])
        shared = sum(self._holders[page] > 1 for page in held[start // self.page_size : self.pages_for(length)])
        return shared + max(self.pages_for(length) - len(held), 0)

    def ensure(self, row: Hashable, start: int, length: int) -> list[tuple[int, int]]:
        """Give `row` pages for `length` tokens, and pages of its own for positions from `start` on.

        Returns the pages to copy on the device, (source, target), before anything is written. That is at most one: the
        page of position `start`, if it is shared and holds tokens before `start`.

        Raises:
            OutOfPages: there are not enough free pages; the row is unchanged.
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
                self._release(held[index])
                held[index] = page
        return copies

    def fork(self, source: Hashable, target: Hashable, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source` by sharing pages; its former pages are released."""
        shared = self._rows[source][: self.pages_for(length)]
        for page in shared:
            self._holders[page] += 1
        self.free(target)
        self._rows[target] = shared

    def move(self, source: Hashable, target: Hashable) -> None:
        """Rename row `source` to `target`; the former pages of `target` are released."""
        self.free(target)
        if (held := self._rows.pop(source, None)) is not None:
            self._rows[target] = held

    def truncate(self, row: Hashable, length: int) -> None:
        """Release the pages after the first `length` tokens."""
        held = self._rows.get(row, [])
        while len(held) > self.pages_for(length):
            self._release(held.pop())

    def free(self, row: Hashable) -> None:
        """Release all pages of a row; the row may be unknown."""
        self.truncate(row, 0)
        self._rows.pop(row, None)

    def table(self, rows: list[Hashable], width: int) -> np.ndarray:
        """int32 [rows, width]: the first pages of each row, padded with page 0, which readers must mask."""
        table = np.zeros((len(rows), width), np.int32)
        for at, row in enumerate(rows):
            held = self._rows.get(row, ())[:width]
            table[at, : len(held)] = held
        return table

    def counts(self) -> dict[str, int]:
        """Pages by state, and the number of rows with pages. If these differ between two idle moments, pages leak."""
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

    def _release(self, page: int) -> None:
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)
