"""Priority, policy and cores of this worker's own processes, put back after a program has played with them."""

import contextlib
import os
from collections.abc import Iterable


class Scheduling:
    """What held when this was made; programs inherit it from their fork server."""

    def __init__(self) -> None:
        self.nice = os.getpriority(os.PRIO_PROCESS, 0)
        self.cores = os.sched_getaffinity(0)

    def restore(self, pids: Iterable[int | None]) -> None:
        """Put each process back where it differs (0 is the caller; None is nobody)."""
        for pid in pids:
            if pid is None:
                continue
            with contextlib.suppress(OSError):  # it has died meanwhile
                if os.getpriority(os.PRIO_PROCESS, pid) != self.nice:
                    os.setpriority(os.PRIO_PROCESS, pid, self.nice)
                if os.sched_getaffinity(pid) != self.cores:
                    os.sched_setaffinity(pid, self.cores)
