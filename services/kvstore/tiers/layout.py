"""How a tier's file is laid out: a page that says whose it is, a table of block headers, page-aligned bodies.

The headers are small and together, so a start reads them all at once, and a body can be read straight into a slot.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import xxhash

from headway.core.keys import KEY_BYTES
from headway.slab.host import PAGE, slot_stride

MAGIC = b"HEADWAYT"
VERSION = 1
FILE = struct.Struct("<8sQ16sQQ")
# A power of two, so that no header lies across two sectors of a disk.
HEADER_BYTES = 128
HEADER = struct.Struct("<4sIQQ16sB16s")
BLOCK_MAGIC = b"HWB1"
CHECKSUM = struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """Of one block. `checksum` is the body's; `generation` rises with every put, so the youngest copy of a key wins."""

    key: bytes
    parent: bytes
    generation: int
    length: int
    checksum: int


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes. `slot_bytes`: of one block; `stride`: from one body to the next."""

    format_digest: bytes
    slot_bytes: int
    slots: int

    @staticmethod
    def fitting(capacity_bytes: int, slot_bytes: int, format_digest: bytes) -> Layout:
        """As many slots as fit; 0 when not even one does."""
        slots = max(0, (capacity_bytes - 2 * PAGE) // (slot_stride(slot_bytes) + HEADER_BYTES))
        return Layout(format_digest, slot_bytes, slots)

    @property
    def stride(self) -> int:
        return slot_stride(self.slot_bytes)

    @property
    def bodies(self) -> int:
        """Offset of the first body."""
        return PAGE + slot_stride(self.slots * HEADER_BYTES)

    @property
    def size(self) -> int:
        return self.bodies + self.slots * self.stride

    def header_at(self, slot: int) -> int:
        return PAGE + slot * HEADER_BYTES

    def body_at(self, slot: int) -> int:
        return self.bodies + slot * self.stride

    def file_header(self) -> bytes:
        """What the file starts with, byte for byte, if it is of this format and size."""
        packed = FILE.pack(MAGIC, VERSION, self.format_digest, self.slot_bytes, self.slots)
        return packed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed))


def body_checksum(body: memoryview) -> int:
    """XXH3 of 64 bits (Collet); 10 GB/s a core, without the interpreter lock."""
    return int(xxhash.xxh3_64_intdigest(body))


def pack_header(header: Header, slot: int) -> bytes:
    """HEADER_BYTES; bound to its slot, so that a header in the wrong place is none."""
    packed = HEADER.pack(
        BLOCK_MAGIC,
        header.length,
        header.generation,
        header.checksum,
        header.key,
        len(header.parent),
        header.parent,
    )
    return (packed + CHECKSUM.pack(xxhash.xxh3_64_intdigest(packed, slot))).ljust(HEADER_BYTES, b"\0")


def unpack_header(packed: bytes, slot: int) -> Header | None:
    """None unless these bytes are a whole header that was written for this slot."""
    body, end = packed[: HEADER.size], HEADER.size + CHECKSUM.size
    if packed[:4] != BLOCK_MAGIC or packed[HEADER.size : end] != CHECKSUM.pack(xxhash.xxh3_64_intdigest(body, slot)):
        return None
    _, length, generation, checksum, key, parent_bytes, parent = HEADER.unpack(body)
    if parent_bytes not in (0, KEY_BYTES):
        return None
    return Header(key, parent[:parent_bytes], generation, length, checksum)
