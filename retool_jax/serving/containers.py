"""Containers: states of tools, such as a Python interpreter, that one answer keeps for a later one that names it."""

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from retool_jax.tools.toolbox import ToolStates


@dataclass
class _Container:
    states: ToolStates = field(default_factory=ToolStates)
    users: int = 0
    used: float = 0.0


class Containers:
    """States of tools by container id. Only the tool `python_session` keeps an interpreter in them.

    Args:
        idle: the most containers that may be idle; the one that was idle longest is dropped first.
        idle_s: seconds after which the sandbox closes an idle interpreter, and its container is dropped.
    """

    def __init__(self, idle: int, idle_s: float) -> None:
        self._idle, self._idle_s = idle, idle_s
        self._all: OrderedDict[str, _Container] = OrderedDict()  # the one that was given back last is the last

    def __contains__(self, name: str) -> bool:
        found = self._all.get(name)
        return found is not None and (found.users > 0 or time.monotonic() - found.used < self._idle_s)

    def take(self, name: str) -> ToolStates:
        """The states of a container, which is made if needed. The caller must `give` it back."""
        if name not in self:
            self._drop(name)
        found = self._all.setdefault(name, _Container())
        found.users += 1
        return found.states

    def give(self, name: str, lost: bool) -> None:
        """Give a container back: it stays for the next answer, or is dropped if its states may be lost."""
        if found := self._all.get(name):
            found.users -= 1
            found.used = time.monotonic()
            self._all.move_to_end(name)
        if lost:
            self._drop(name)
        idle = [each for each, found in self._all.items() if not found.users]
        for each in idle[: max(len(idle) - self._idle, 0)]:
            self._drop(each)

    def close(self) -> None:
        for name in list(self._all):
            self._drop(name)

    def _drop(self, name: str) -> None:
        if found := self._all.pop(name, None):
            found.states.begin_to_close()
