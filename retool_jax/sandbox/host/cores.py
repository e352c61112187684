"""A core for each worker, instead of any.

Programs of a worker run one at a time, and under gVisor each of their system calls passes from one thread to another
and back. On one core that is about a fifth faster than over two. It also keeps the kernel fair: a control group whose
threads wander is weighed anew at each step, and with that loses count of what it has used; the owner's event loop was
seen to wait for its turn for 50 ms.
"""

import os
import random
import socket
from collections import Counter

from retool_jax.sandbox.launch.cgroup import has_processor_quota


class Cores:
    """Up to `count` cores of this machine that no other sandbox has taken. One with none leaves it to the kernel.

    A core is taken by a socket with its number for a name, which the kernel gives to one process and frees at its end.
    Within a container that has a share of all cores instead of cores of its own, none is taken: others cannot be seen
    from there.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._taken: dict[int, socket.socket] = {}
        self._workers: Counter[int] = Counter()
        self._all = os.sched_getaffinity(0)
        self.enough = len(self._all) >= count  # whether there are as many cores as that
        self._free = [] if has_processor_quota() else list(self._all)
        random.SystemRandom().shuffle(self._free)  # so that sandboxes that cannot see each other rarely meet

    def assign(self) -> int | None:
        """The core for a new worker: one with as few as possible; None if it may run on any."""
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
        """The cores that a worker of `core` may run on."""
        return self._all if core is None else {core}

    def enter(self, core: int | None) -> None:
        """Say that a worker has come to a core."""
        if core is not None:
            self._workers[core] += 1

    def best(self, core: int | None, busy: Counter[int | None]) -> int | None:
        """The core on which a worker of `core` should run next: that one, or one with fewer of the `busy` workers."""
        if core is None:
            return None
        quiet = min(self._taken, key=lambda other: busy[other], default=core)
        return quiet if busy[quiet] < busy[core] else core

    def leave(self, core: int | None) -> None:
        """Say that a worker has gone from it."""
        if core is not None:
            self._workers[core] -= 1

    def close(self) -> None:
        """Let others have the cores."""
        for claim in self._taken.values():
            claim.close()
        self._taken.clear()
        self._free.clear()
