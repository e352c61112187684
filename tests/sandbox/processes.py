"""What tests do to processes from outside."""

import os
import signal
from contextlib import suppress


def send(number: int, *pids: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(*pids: int) -> None:
    send(signal.SIGKILL, *pids)
