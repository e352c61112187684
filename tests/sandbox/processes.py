"""How tests observe processes, and send signals to them, from outside."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress

from retool_jax.sandbox.launch.procfs import family


def send(number: int, *pids: int) -> None:
    """Send a signal to those processes that still exist."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(*pids: int) -> None:
    send(signal.SIGKILL, *pids)


def kill_whole(workers: Iterable[int]) -> None:
    """Kill workers with all their descendants: these live a moment longer than the outermost process, and on a busy
    machine that is long enough for an answer."""
    kill(*(pid for worker in workers for pid in family(worker)))


def below(pid: int) -> set[int]:
    """Live descendants of a process."""
    return set(family(pid)) - {pid}
