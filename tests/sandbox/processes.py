"""What tests see of processes, and do to them, from outside."""

import os
import signal
from collections.abc import Iterable
from contextlib import suppress

from retool_jax.sandbox.launch.procfs import family


def send(number: int, *pids: int) -> None:
    """Send a signal to those of the processes that are still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill(*pids: int) -> None:
    send(signal.SIGKILL, *pids)


def kill_whole(workers: Iterable[int]) -> None:
    """Kill workers with all that lies below them: what is inside lives a moment longer than what holds it, and on a
    busy machine that is long enough for an answer."""
    kill(*(pid for worker in workers for pid in family(worker)))


def below(pid: int) -> set[int]:
    """Live processes below one."""
    return set(family(pid)) - {pid}
