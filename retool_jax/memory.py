"""How a process of jax treats memory: what it has freed it keeps, and it looks for garbage rarely."""

import ctypes
import gc
import glob
import os
import sys
from contextlib import suppress
from pathlib import Path

# Of glibc's mallopt(3).
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
NEVER = -1

ACCELERATORS = "/dev/accel*", "/dev/vfio/*", "/dev/nvidia*"  # of TPUs and GPUs


def keep_freed_memory() -> None:
    """Let the process keep what it frees, where the C library is glibc; to be called before jax is imported.

    A step on a CPU takes its temporary arrays anew from the system, which fills them with zeros page by page: a twelfth
    of the time of a small update. Kept memory is used again as it is. The process never holds more than it once
    needed at once, but for gaps between pieces, and it does not shrink. So nothing is changed beside an accelerator,
    whose host holds large pieces only while a checkpoint is read or written.
    """
    if not sys.platform.startswith("linux") or any(map(glob.glob, ACCELERATORS)):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(ARENA_MAX, 1)  # the only arena that can keep large pieces
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, NEVER)


def host_bytes() -> int:
    """The memory that this machine, or the control group of this process, has in all."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such group, or "max"
            there = min(there, int(Path(path).read_text()))
    return there


def collect_rarely() -> None:
    """Let Python look for cycles of objects after 20,000 new objects, where it does so after 700.

    Tracing makes many objects that stay, and each look visits the young ones anew: 1.0 of the 13 CPU-seconds of a
    short run of the miniature, and 0.3 with this.
    """
    young, *older = gc.get_threshold()
    gc.set_threshold(max(young, 20_000), *older)
