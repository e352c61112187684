"""A program's output streams. Their buffers outlive it, so output from before it was killed is not lost."""

import _thread
import errno
import io
import mmap
import sys

ROOM_BYTES = 8192
EMPTY = b"\xff"  # fills the unused part: this byte never occurs in UTF-8 text
NOTHING = EMPTY * ROOM_BYTES


def kept_in(memory: bytes) -> bytes:
    """What the memory of an `Output` holds. The program can write anything there."""
    return memory.rstrip(EMPTY)


class Output(io.BufferedWriter):
    """Sends a stream line by line. An unfinished line is kept in memory that is shared with the fork server, which can
    read it after the program has ended."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw, 1)
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self.clear()

    def _keep_in(self, memory: mmap.mmap) -> None:
        self.memory, self._keep, self._lock = memory, memory.write, _thread.RLock()

    def clear(self) -> None:
        """Remove everything, so that the next program finds nothing of the last one."""
        self.memory[:] = NOTHING

    @property
    def used(self) -> bool:
        """Whether anything is kept; nothing is copied to find out."""
        return memoryview(self.memory) != NOTHING

    def detach_from_parent(self) -> None:
        """In a child that the program has forked: continue with a copy, as with any buffer."""
        begun = self.memory[: self.memory.tell()]
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self._keep(begun)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        with self._lock:
            if b"\n" not in data:
                try:
                    return self._keep(data)
                except ValueError:  # it does not fit
                    pass
            self._send(data)
        return len(data)

    def flush(self) -> None:
        with self._lock:
            self._send(b"")

    def _send(self, data: bytes) -> None:
        """Send what is kept, then `data`."""
        if used := self.memory.tell():
            data = self.memory[:used] + data
            self.memory.seek(0)
            self.memory[:used] = NOTHING[:used]  # before sending: a kill in between would show it twice
        while data:
            sent = self.raw.write(data)
            if sent is None:  # the program has made its pipe non-blocking
                self._keep(data[:ROOM_BYTES])
                raise BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0)
            data = memoryview(data)[sent:] if sent < len(data) else b""


def replace_streams() -> tuple[Output, Output]:
    """Make `sys.stdout` and `sys.stderr` UTF-8 streams over an `Output`; returns both outputs."""
    outputs = []
    for name in ("stdout", "stderr"):
        output = Output(getattr(sys, name).detach().detach())
        text = io.TextIOWrapper(output, "utf-8", "backslashreplace", "\n", write_through=True)
        text.mode = "w"
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
        outputs.append(output)
    return outputs[0], outputs[1]
