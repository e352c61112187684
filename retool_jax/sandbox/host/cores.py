"""Puts each worker on one core.

A worker runs one program at a time, and under gVisor each system call passes from one thread to another and back. That
is about a fifth faster on one core than on two. It also keeps the kernel fair: when the threads of a control group
change cores, Linux computes its weight anew and loses count of what it has used. The owner's event loop was seen to
wait for its turn for 50 ms.
"""

import os
import random
import socket
from collections import Counter

from retool_jax.sandbox.launch.cgroup import has_processor_quota


class Cores:
    """Up to `count` cores of this machine that no other sandbox has taken. With none, the kernel places the workers.

    A core is taken by binding a socket whose name has its number: the kernel gives a name to one process and frees it
    when that process ends. In a container with a share of all cores instead of its own, no core is taken, because
    sandboxes in other containers cannot be seen.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: dict[int, socket.socket] = {}
        self._workers: Counter[int] = Counter()
        self._all = os.sched_getaffinity(0)
        self.enough = len(self._all) >= count  # whether the machine has `count` cores
        self._free = [] if has_processor_quota() else list(self._all)
        random.SystemRandom().shuffle(self._free)  # sandboxes that cannot see each other then rarely take the same core

    def assign(self) -> int | None:
        """The core with the fewest workers, for a new one; None if it may run on any."""
        while self._free and len(self._taken) < self._count and all(self._workers[core] for core in self._taken):
            core = self._free.pop()
            claim = socket.socket(socket.AF_UNIX)
            try:
                claim.bind(f"\0retool-sandbox-core-{core}")
            except OSError:
                claim.close()
            else:
                self._taken[core] = claim
        core = min(self._taken, key=lambda core: self._workers[core], default=None)
        self.enter(core)
        return core

    def among(self, core: int | None) -> set[int]:
        """The cores that a worker with this `core` may run on."""
        return self._all if core is None else {core}

    def enter(self, core: int | None) -> None:
        """Count a worker that comes to a core."""
        if core is not None:
            self._workers[core] += 1

    def best(self, core: int | None, busy: Counter[int | None]) -> int | None:
        """The core on which a worker with this `core` should run next: the same, or one with fewer `busy` workers."""
        if core is None:
            return None
        quiet = min(self._taken, key=lambda other: busy[other], default=core)
        return quiet if busy[quiet] < busy[core] else core

    def leave(self, core: int | None) -> None:
        """Count a worker that leaves a core."""
        if core is not None:
            self._workers[core] -= 1

    def close(self) -> None:
        """Free the cores for others."""
        for claim in self._taken.values():
            claim.close()
        self._taken.clear()
        self._free.clear()
