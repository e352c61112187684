"""Keeps the first and the last part of output streams of any length."""

import os

READ_BYTES = 65536
CUT = b"\n[... bytes removed ...]\n"  # without a count, which a policy could take for a number of the output


class Capture:
    """Keeps the first and the last half of `limit` bytes of a stream, whatever its length."""

    def __init__(self, limit: int):
        self.half = limit // 2
        self.total = 0
        self.head = bytearray()
        self.tail = bytearray()

    def add(self, data: bytes) -> None:
        self.total += len(data)
        room = self.half - len(self.head)
        self.head += data[:room]
        self.tail += data[room:]
        if len(self.tail) > 4 * self.half:  # trimmed only now and then, because each trim copies what stays
            del self.tail[: -self.half]

    @property
    def truncated(self) -> bool:
        return self.total > 2 * self.half

    def kept(self) -> bytes:
        if not self.truncated:
            return bytes(self.head + self.tail)
        return bytes(self.head) + CUT + bytes(self.tail[-self.half :])


class Streams:
    """The two output streams of a program while it runs one request."""

    def __init__(self, descriptors: tuple[int, int], limits: dict):
        self.captures = {descriptor: Capture(limits["output_bytes"]) for descriptor in descriptors}
        self.open = set(descriptors)
        self.raw_limit = limits["raw_output_bytes"]

    def read(self, descriptor: int) -> bool:
        """Read what one stream holds, at most `READ_BYTES`; False if there was nothing."""
        try:
            data = os.read(descriptor, READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self.open.discard(descriptor)
        self.captures[descriptor].add(data)
        return bool(data)

    def drain(self) -> None:
        """Read what is left in the streams, without waiting and up to the limit."""
        for descriptor in tuple(self.open):
            while not self.over and self.read(descriptor):
                pass

    @property
    def over(self) -> bool:
        return sum(capture.total for capture in self.captures.values()) > self.raw_limit
