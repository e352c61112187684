"""A program's output streams. Their buffers outlive it, so output from before it was killed is not lost."""

import _thread
import errno
import io
import mmap
import sys

ROOM_BYTES = 8192
EMPTY = b"\xff"  # fills the unused part: this byte never occurs in UTF-8 text
NOTHING = EMPTY * ROOM_BYTES
SINGLE_LINES = 100


def kept_in(memory: bytes) -> bytes:
    """What the memory of an `Output` holds. The program can write anything there."""
    return memory.rstrip(EMPTY)


class Output(io.BufferedWriter):
    """Sends the first `SINGLE_LINES` lines one by one, so that they come before what other processes write later. Then
    lines are sent in blocks, as Python does for any pipe: under gVisor a line costs some 50 microseconds, and a program
    that prints 200,000 would run out of time. What is not sent is kept in memory that is shared with the fork server,
    which can read it after the program has ended."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw, 1)
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self.clear()

    def _keep_in(self, memory: mmap.mmap) -> None:
        self.memory, self._keep, self._lock = memory, memory.write, _thread.RLock()

    def clear(self) -> None:
        """Remove everything, so that the next program finds nothing of the last one."""
        self.memory[:] = NOTHING
        self._single_lines = SINGLE_LINES

    @property
    def used(self) -> bool:
        """Whether anything is kept; nothing is copied to find out."""
        return self.memory.find(NOTHING, 0) != 0

    def send_lines(self) -> None:
        """Before a fork: send the lines that are complete, so that the child does not have them too."""
        with self._lock:
            kept = self.memory[: self.memory.tell()]
            end = kept.rfind(b"\n") + 1
            if end:
                self._empty(len(kept))
                self._keep(kept[end:])
                self._write(kept[:end])

    def detach_from_parent(self) -> None:
        """In a child that the program has forked: continue line by line, with a copy, as with any buffer."""
        self._single_lines = -1
        begun = self.memory[: self.memory.tell()]
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self._keep(begun)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        with self._lock:
            if b"\n" not in data or not self._single_lines:
                try:
                    return self._keep(data)
                except ValueError:  # it does not fit
                    pass
            else:
                self._single_lines -= 1
            self._send(data)
        return len(data)

    def flush(self) -> None:
        with self._lock:
            self._send(b"")

    def _send(self, data: bytes) -> None:
        """Send what is kept, then `data`."""
        if used := self.memory.tell():
            data = self.memory[:used] + data
            self._empty(used)  # before sending: a kill in between would show it twice
        self._write(data)

    def _empty(self, used: int) -> None:
        self.memory.seek(0)
        self.memory[:used] = NOTHING[:used]

    def _write(self, data: bytes) -> None:
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
