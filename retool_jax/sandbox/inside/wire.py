"""Messages: frames to and from the host, and packets with descriptors between the processes inside.

A frame is a 4-byte big-endian length and that many bytes of JSON. A packet is one datagram of a SEQPACKET socket: data
of `marshal`, or a single "@" if the data is too long for a datagram; then the last descriptor is a memory file that
holds it. Packets are read only from processes that no program can reach.
"""

import array
import json
import marshal
import os
import socket
import struct

MAX_FRAME_BYTES = 64 << 20
MAX_PACKET_BYTES = 60_000  # the kernel's default socket buffer is 208 KiB, and counts more than the data
MAX_DESCRIPTORS = 8


def read_exactly(descriptor: int, size: int) -> bytes:
    """The next `size` bytes. Raises EOFError if the stream ends first."""
    data = bytearray()
    while len(data) < size:
        part = os.read(descriptor, min(size - len(data), 1 << 20))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def read_frame(descriptor: int) -> dict:
    """The next frame. Raises EOFError at the end of the stream, or if the data is not a frame."""
    (size,) = struct.unpack(">I", read_exactly(descriptor, 4))
    if size > MAX_FRAME_BYTES:
        raise EOFError
    try:
        return json.loads(read_exactly(descriptor, size))
    except ValueError:
        raise EOFError from None


def write_frame(descriptor: int, message: dict) -> None:
    payload = json.dumps(message).encode()
    data = memoryview(struct.pack(">I", len(payload)) + payload)
    while data:
        data = data[os.write(descriptor, data) :]


def memory_file(name: str, data: bytes) -> int:
    """A descriptor from which `data` can be read; unlike a pipe, nobody has to feed it."""
    descriptor = os.memfd_create(name)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def send_packet(channel: socket.socket, message: object, descriptors: tuple[int, ...] = ()) -> None:
    """Send a message of plain values, and copies of descriptors. Raises OSError if the other end is closed."""
    payload = marshal.dumps(message)
    if len(payload) > MAX_PACKET_BYTES:
        spill = memory_file("packet", payload)
        try:
            _send(channel, b"@", (*descriptors, spill))
        finally:
            os.close(spill)
    else:
        _send(channel, payload, descriptors)


def _send(channel: socket.socket, payload: bytes, descriptors: tuple[int, ...]) -> None:
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    channel.sendmsg([payload], rights)


def receive_packet(channel: socket.socket) -> tuple[bytes, list[int]]:
    """The next packet, still packed, for `unpack`. Raises EOFError if the other end is closed."""
    payload, ancillary, _, _ = channel.recvmsg(MAX_PACKET_BYTES, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS))
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    if not payload:
        raise EOFError
    return payload, list(descriptors)


def unpack(payload: bytes, descriptors: list[int]) -> object:
    """The message of a packet; if it lies in a memory file, that one is removed from `descriptors`."""
    if payload == b"@":
        spill = descriptors.pop()
        payload = read_exactly(spill, os.fstat(spill).st_size)
        os.close(spill)
    return marshal.loads(payload)
