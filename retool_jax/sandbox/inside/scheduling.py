"""Restores priority and cores of this worker's own processes after a program has changed them."""

import contextlib
import os
from collections.abc import Iterable


class Scheduling:
    """The priority and cores of this process when the object is made; programs inherit them from their fork server."""

    def __init__(self) -> None:
        self.nice = os.getpriority(os.PRIO_PROCESS, 0)
        self.cores = os.sched_getaffinity(0)

    def restore(self, pids: Iterable[int | None]) -> None:
        """Restore each process that differs (0: the caller; None is ignored)."""
        for pid in pids:
            if pid is None:
                continue
            with contextlib.suppress(OSError):  # the process has ended meanwhile
                if os.getpriority(os.PRIO_PROCESS, pid) != self.nice:
                    os.setpriority(os.PRIO_PROCESS, pid, self.nice)
                if os.sched_getaffinity(pid) != self.cores:
                    os.sched_setaffinity(pid, self.cores)
