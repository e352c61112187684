"""A program's output streams, whose buffers outlive it: what it wrote before it was killed is not lost."""

import _thread
import errno
import io
import mmap
import sys

ROOM_BYTES = 8192
EMPTY = b"\xff"  # fills what is unused: UTF-8 text never has this byte
NOTHING = EMPTY * ROOM_BYTES


class Output(io.BufferedWriter):
    """Bytes of a stream. They are sent line by line; what is no whole line yet is kept in memory that is shared with
    the process that forks the program, which can read it when the program is gone."""

    def __init__(self, raw: io.FileIO):
        super().__init__(raw, 1)
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self.clear()

    def _keep_in(self, memory: mmap.mmap) -> None:
        self._memory, self._keep, self._lock = memory, memory.write, _thread.RLock()

    def clear(self) -> None:
        """Leave nothing of a program for the next one."""
        self._memory[:] = NOTHING

    def kept(self) -> bytes:
        """What is kept. The program could write there whatever it liked."""
        return self._memory[:].rstrip(EMPTY)

    def part_from_parent(self) -> None:
        """In a child that the program has forked: go on with a copy, as it is with any buffer."""
        begun = self._memory[: self._memory.tell()]
        self._keep_in(mmap.mmap(-1, ROOM_BYTES))
        self._keep(begun)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        if type(data) is not bytes:
            data = bytes(memoryview(data))
        with self._lock:
            if b"\n" not in data:
                try:
                    return self._keep(data)
                except ValueError:  # there is no room for it
                    pass
            self._send(data)
        return len(data)

    def flush(self) -> None:
        with self._lock:
            self._send(b"")

    def _send(self, data: bytes) -> None:
        """Send what is kept, then `data`."""
        if used := self._memory.tell():
            data = self._memory[:used] + data
            self._memory.seek(0)
            self._memory[:used] = NOTHING[:used]  # before it is sent: who is killed meanwhile would show it twice
        while data:
            sent = self.raw.write(data)
            if sent is None:  # the program has made its pipe one that does not wait
                self._keep(data[:ROOM_BYTES])
                raise BlockingIOError(errno.EAGAIN, "write could not complete without blocking", 0)
            data = memoryview(data)[sent:] if sent < len(data) else b""


def replace_streams() -> tuple[Output, Output]:
    """Make `sys.stdout` and `sys.stderr` streams of UTF-8 that keep what is unsent; returns what is below the text."""
    outputs = []
    for name in ("stdout", "stderr"):
        output = Output(getattr(sys, name).detach().detach())
        text = io.TextIOWrapper(output, "utf-8", "backslashreplace", "\n", write_through=True)
        text.mode = "w"
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
        outputs.append(output)
    return outputs[0], outputs[1]
