"""What goes over a data connection of the socket plane.

Reader to source: 32 bytes of secret, once; then requests. Source to reader: one byte once the secret was right; then
for each request, in order, the blocks' bytes one after the other and a verdict for each: whether the slot was still
current after its bytes were sent, and (if asked for) the block's xxh3_64.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Sequence

SECRET_BYTES = 32
WELCOME = b"\x01"
MOST_BLOCKS = 256
REQUEST = struct.Struct("<4sHH")
SLOT = struct.Struct("<IQ")
VERDICT = struct.Struct("<BQ")
_MAGIC = b"HWr1"


class FrameError(Exception):
    """The other side broke the protocol, or went away; one sentence."""


def pack_request(slots: Sequence[tuple[int, int]], *, checksum: bool) -> bytes:
    """`slots`: (slot, generation), at most MOST_BLOCKS."""
    return REQUEST.pack(_MAGIC, int(checksum), len(slots)) + b"".join(SLOT.pack(*slot) for slot in slots)


def read_request(connection: socket.socket) -> tuple[list[tuple[int, int]], bool] | None:
    """(slot, generation) of each block wanted, and whether checksums are; None at the end of the stream."""
    head = connection.recv(REQUEST.size, socket.MSG_WAITALL)
    if not head:
        return None
    if len(head) < REQUEST.size:
        raise FrameError("the request was cut off")
    magic, flags, count = REQUEST.unpack(head)
    if magic != _MAGIC or not 0 < count <= MOST_BLOCKS:
        raise FrameError("these bytes are not a request")
    body = connection.recv(SLOT.size * count, socket.MSG_WAITALL)
    if len(body) < SLOT.size * count:
        raise FrameError("the request was cut off")
    return list(SLOT.iter_unpack(body)), bool(flags & 1)


def send_all(connection: socket.socket, buffers: list[memoryview]) -> None:
    """Gathered, without a copy in this process."""
    while buffers:
        sent = connection.sendmsg(buffers)
        while buffers and sent >= len(buffers[0]):
            sent -= len(buffers.pop(0))
        if sent:
            buffers[0] = buffers[0][sent:]


def receive_all(connection: socket.socket, buffers: list[memoryview]) -> None:
    """Scattered, without a copy in this process. Raises FrameError when the stream ends before all are full."""
    while buffers:
        got, _, _, _ = connection.recvmsg_into(buffers, 0, socket.MSG_WAITALL)
        if not got:
            raise FrameError("the connection ended in the middle of a block")
        while buffers and got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        if got:
            buffers[0] = buffers[0][got:]


def set_timeouts(connection: socket.socket, *, receive_s: float, send_s: float) -> None:
    """For each call on a blocking socket; 0 for none. (A timeout of Python's own would make every call two.)"""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        connection.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6)))


def hang_up(connection: socket.socket) -> None:
    """End the stream for both directions; a thread that waits in it wakes up."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
