"""Freed memory is reused by the next step without system calls."""

import subprocess
import sys

PROGRAM = """
import ctypes, resource, sys, threading

if "kept" in sys.argv:
    from retool_jax.memory import keep_freed_memory
    keep_freed_memory()

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def step():
    pieces = [(ctypes.c_void_p(libc.malloc(size)), size) for size in (3 << 20, 40 << 20, 7 << 20)]
    for piece, size in pieces:
        libc.memset(piece, 1, size)
    for piece, _ in pieces:
        libc.free(piece)

def faults(run):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    thread = threading.Thread(target=step)
    thread.start()
    thread.join()

step()
print(faults(step), faults(in_a_thread))
"""


def test_freed_memory_is_used_again():
    def faults(*words: str) -> list[int]:
        done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
        return [int(word) for word in done.stdout.split()]

    pages = (40 << 20) // 4096
    assert min(faults()) > pages / 2
    assert max(faults("kept")) < pages / 20
