"""What tests see of processes, and do to them, from outside."""

import os
import signal
from contextlib import suppress
from pathlib import Path


def send(number: int, *pids: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(*pids: int) -> None:
    send(signal.SIGKILL, *pids)


def below(pid: int) -> set[int]:
    """Live processes below one. Any of its threads may have started them: gVisor's runner forks from several."""
    found: set[int] = set()
    with suppress(OSError):  # it ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found.update(map(int, (thread / "children").read_text().split()))
    return found.union(*map(below, found))
