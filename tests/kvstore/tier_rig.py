"""What tests of the tiers share: blocks whose bytes follow from their key, page-aligned memory, a real writer."""

from __future__ import annotations

import hashlib
import mmap
import sys
from pathlib import Path

from headway.slab.host import slot_stride
from services.kvstore.tiers.contract import Tier
from services.kvstore.tiers.disk import DiskTier
from services.kvstore.tiers.layout import Layout

DIGEST = b"kv format digest"
# Not a whole number of pages, so that padding matters.
SLOT_BYTES = 3 * 4096 + 512
SLOTS = 8


def key_of(name: int) -> bytes:
    return hashlib.blake2b(b"key %d" % name, digest_size=16).digest()


def body_of(key: bytes, length: int = SLOT_BYTES) -> bytes:
    return hashlib.shake_128(key).digest(length)


def slot(length: int = SLOT_BYTES) -> memoryview:
    """Like a slot of the slab: page-aligned, one stride long."""
    return memoryview(mmap.mmap(-1, slot_stride(length)))


def capacity(slots: int) -> int:
    return slots * (slot_stride(SLOT_BYTES) + 128) + 2 * 4096


def layout(slots: int = SLOTS) -> Layout:
    return Layout(DIGEST, SLOT_BYTES, slots)


def reopen(path: Path, slots: int = SLOTS) -> DiskTier:
    return DiskTier.open(path, capacity(slots), SLOT_BYTES, DIGEST)


def put(tier: Tier, *names: int, parent: bytes = b"") -> list[bytes]:
    """A chain of blocks, parents first, written when this returns; their keys."""
    keys = [key_of(name) for name in names]
    for key in keys:
        assert tier.put(key, parent, memoryview(body_of(key)))
        parent = key
    tier.flush()
    return keys


def right(tier: Tier, keys: list[bytes]) -> int:
    """How many leading blocks the tier gives; fails if one of them has other bytes than were put."""
    views = [slot() for _ in keys]
    good = tier.get(keys, views)
    for key, view in zip(keys[:good], views, strict=False):
        assert bytes(view[:SLOT_BYTES]) == body_of(key)
    return good


def write_for_ever(path: Path, slots: int) -> None:
    """Puts chains of four until killed; prints a line when the first is written."""
    tier = DiskTier.open(path, capacity(slots), SLOT_BYTES, DIGEST)
    name = len(tier.keys()) * 1000
    while True:
        put(tier, *range(name, name + 4))
        if not name % 1000:
            print("writing", flush=True)
        name += 4


if __name__ == "__main__":
    write_for_ever(Path(sys.argv[1]), int(sys.argv[2]))
