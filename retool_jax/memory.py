"""Memory settings of a process that uses jax: keep freed memory, collect garbage rarely."""

import ctypes
import gc
import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

# Options of glibc's mallopt(3)
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1

ACCELERATORS = "/dev/accel*", "/dev/vfio/*", "/dev/nvidia*"  # device files of TPUs and GPUs


def keep_freed_memory() -> None:
    """Let the process keep the memory that it frees (glibc only). Call this before jax is imported.

    Otherwise each step on a CPU gets its temporary arrays anew from the system, which zeroes them page by page: a
    twelfth of the time of a small update. The process then stays at its peak size, plus fragmentation. So nothing is
    changed on hosts of accelerators, which hold large arrays only while a checkpoint is read or written.
    """
    if not sys.platform.startswith("linux") or any(map(glob.glob, ACCELERATORS)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(ARENA_MAX, 1)  # only the main arena can keep large blocks
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, NEVER)


def host_bytes() -> int:
    """Total memory in bytes of this machine, or the limit of this process's control group if that is lower."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or "max"
            there = min(there, int(Path(path).read_text()))
    return there


def collect_rarely() -> None:
    """Run Python's cyclic garbage collector after 20,000 new objects instead of 700.

    Tracing makes many objects that stay, and each collection visits the young ones again. It took 1.0 of the 13
    CPU-seconds of a short run of the miniature, and takes 0.3 with this.
    """
    young, *older = gc.get_threshold()
    gc.set_threshold(max(young, 20_000), *older)
