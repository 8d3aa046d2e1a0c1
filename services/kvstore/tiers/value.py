"""A block as a value in somebody else's store: a header that says which block it is, then its bytes."""

from __future__ import annotations

import struct

import xxhash

MAGIC = b"HWV1"
HEADER = struct.Struct("<4sI16sB16s")
CHECKSUM = struct.Struct("<Q")
# A round number, so that the bytes behind it are aligned for whoever copies them.
HEADER_BYTES = 64


def fill_header(value: bytearray, key: bytes, parent: bytes) -> None:
    """Write the header in front of the block's bytes, which are there already."""
    HEADER.pack_into(value, 0, MAGIC, len(value) - HEADER_BYTES, key, len(parent), parent)
    CHECKSUM.pack_into(value, HEADER.size, _checksum(value))


def opens_as(key: bytes, length: int, value: bytes) -> bool:
    """Whether this is the whole block of that key, as it was put."""
    if len(value) != HEADER_BYTES + length:
        return False
    magic, said, whose, _, _ = HEADER.unpack_from(value)
    if (magic, said, whose) != (MAGIC, length, key):
        return False
    return bool(CHECKSUM.unpack_from(value, HEADER.size)[0] == _checksum(value))


def _checksum(value: bytes | bytearray) -> int:
    """Of the header, and from there of the body: neither can change alone."""
    with memoryview(value) as view:
        seed = xxhash.xxh3_64_intdigest(view[: HEADER.size])
        return int(xxhash.xxh3_64_intdigest(view[HEADER_BYTES:], seed))
