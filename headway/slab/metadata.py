"""What a kvstore knows of its slab, in a segment of its own that no worker maps and that outlives the process.

    notes A | notes B | states [slots] u8 | generations [slots] u64 | parents [slots] u32 | keys [slots, 16]

Notes are what changes rarely, as JSON, written to A and B in turn; the newer one that is whole counts. Slots' records
are written in place: the state comes last, so that a record is whole whenever its state says so.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
import zlib
from typing import Any

from headway.core.records import SEALED
from headway.slab.host import SHM, SlabError

NOTES_BYTES = 1 << 16
KEY_BYTES = 16
_HEAD = struct.Struct("<8sQII")
_MAGIC = b"headway1"
_NO_PARENT = 0xFFFFFFFF


class Metadata:
    """The file /dev/shm/NAME.meta, locked as long as this process lives. Raises SlabError when another one has it."""

    def __init__(self, name: str) -> None:
        self.path = SHM / f"{name}.meta"
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            message = f"another kvstore uses the slab {name}; stop it, or choose another name with --slab-name"
            raise SlabError(message) from None
        if os.fstat(self._descriptor).st_size < 2 * NOTES_BYTES:
            os.posix_fallocate(self._descriptor, 0, 2 * NOTES_BYTES)
        self._notes = mmap.mmap(self._descriptor, 2 * NOTES_BYTES)
        self._number = 0

    def read_notes(self) -> dict[str, Any] | None:
        """The last ones written whole; None when there are none."""
        found: dict[str, Any] | None = None
        for area in range(2):
            magic, number, length, checksum = _HEAD.unpack_from(self._notes, area * NOTES_BYTES)
            start = area * NOTES_BYTES + _HEAD.size
            text = self._notes[start : start + min(length, NOTES_BYTES)]
            if magic == _MAGIC and number > self._number and _checksum(number, text) == checksum:
                self._number, found = number, json.loads(text)
        return found

    def write_notes(self, notes: dict[str, Any]) -> None:
        """Raises SlabError when they are too long."""
        text = json.dumps(notes).encode()
        if len(text) > NOTES_BYTES - _HEAD.size:
            raise SlabError(f"the slab's notes take {len(text)} bytes; too many workers are attached to one kvstore")
        self._number += 1
        start = self._number % 2 * NOTES_BYTES
        self._notes[start : start + _HEAD.size] = bytes(_HEAD.size)
        self._notes[start + _HEAD.size : start + _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._notes, start, _MAGIC, self._number, len(text), _checksum(self._number, text))

    def records(self, slots: int, *, fresh: bool) -> SlotRecords:
        """Those of `slots` slots, all free where `fresh`."""
        size = 2 * NOTES_BYTES + SlotRecords.size(slots)
        if fresh:
            os.ftruncate(self._descriptor, 2 * NOTES_BYTES)
            os.posix_fallocate(self._descriptor, 0, size)
        memory = mmap.mmap(self._descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return SlotRecords(memoryview(memory)[2 * NOTES_BYTES :], slots)

    def has_records(self, slots: int) -> bool:
        return os.fstat(self._descriptor).st_size == 2 * NOTES_BYTES + SlotRecords.size(slots)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self._descriptor)


class SlotRecords:
    """headway.core.records.Records in shared memory."""

    def __init__(self, memory: memoryview, slots: int) -> None:
        generations, parents, keys = _offsets(slots)
        self.states = memory[:slots]
        self.generations = memory[generations : generations + 8 * slots].cast("Q")
        self._parents = memory[parents : parents + 4 * slots].cast("I")
        self._keys = memory[keys : keys + KEY_BYTES * slots]

    @staticmethod
    def size(slots: int) -> int:
        """Bytes of the records of so many slots."""
        return _offsets(slots)[2] + KEY_BYTES * slots

    def seal(self, slot: int, key: bytes, parent: int | None) -> None:
        self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES] = key
        self._parents[slot] = _NO_PARENT if parent is None else parent
        self.states[slot] = SEALED

    def block(self, slot: int) -> tuple[bytes, int | None]:
        parent = self._parents[slot]
        return bytes(self._keys[slot * KEY_BYTES : (slot + 1) * KEY_BYTES]), None if parent == _NO_PARENT else parent


def _checksum(number: int, text: bytes) -> int:
    return zlib.crc32(text, zlib.crc32(number.to_bytes(8, "little")))


def _offsets(slots: int) -> tuple[int, int, int]:
    """Where generations, parents and keys begin, aligned to 64 bytes."""
    generations = -(-slots // 64) * 64
    parents = generations + -(-8 * slots // 64) * 64
    return generations, parents, parents + -(-4 * slots // 64) * 64
