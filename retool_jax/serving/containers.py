"""Containers: what the tools of one answer keep for the next one that names it, above all a Python interpreter."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from retool_jax.tools.toolbox import Kept


@dataclass
class _Container:
    kept: Kept = field(default_factory=Kept)
    users: int = 0
    used: float = 0.0


class Containers:
    """States of tools by their container's id. They hold interpreters only where a tool keeps one (`python_session`).

    Args:
        idle: that may wait for their next answer; the one that waited longest makes room.
        idle_s: after which the sandbox closes an interpreter, and its container is forgotten.
    """

    def __init__(self, idle: int, idle_s: float) -> None:
        self._idle, self._idle_s = idle, idle_s
        self._all: OrderedDict[str, _Container] = OrderedDict()  # the one given back last at the end

    def __contains__(self, name: str) -> bool:
        found = self._all.get(name)
        return found is not None and (found.users > 0 or time.monotonic() - found.used < self._idle_s)

    def take(self, name: str) -> Kept:
        """The states of a container, which is made where there is none; whoever takes it gives it back."""
        if name not in self:
            self._forget(name)
        found = self._all.setdefault(name, _Container())
        found.users += 1
        return found.kept

    def give(self, name: str, lost: bool) -> None:
        """Let it wait for the next answer, or forget it where what it holds may be lost."""
        if found := self._all.get(name):
            found.users -= 1
            found.used = time.monotonic()
            self._all.move_to_end(name)
        if lost:
            self._forget(name)
        idle = [each for each, found in self._all.items() if not found.users]
        for each in idle[: max(len(idle) - self._idle, 0)]:
            self._forget(each)

    def close(self) -> None:
        for name in list(self._all):
            self._forget(name)

    def _forget(self, name: str) -> None:
        if found := self._all.pop(name, None):
            found.kept.begin_to_close()
