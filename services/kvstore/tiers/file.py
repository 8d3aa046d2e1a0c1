"""The file under the disk tier: made and checked at start, read and written in whole blocks."""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from headway.slab.host import PAGE
from services.kvstore.tiers.contract import TierError
from services.kvstore.tiers.layout import HEADER_BYTES, Header, Layout, pack_header, unpack_header

NO_HEADER = bytes(HEADER_BYTES)


class BlockFile:
    """Bodies go around the page cache (O_DIRECT) where the file system and the memory's alignment allow it.

    Measured (docs/tiers.md), that reads cold blocks 1.6 times as fast for a third of the CPU, and does not push out
    pages that others need: the slab is the cache. No fsync anywhere: what a power cut takes is computed again, and what
    it tears fails its checksum. Raises TierError when the file cannot be made.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self.fresh = False
        try:
            # Blocks are what clients wrote: nobody else's to read.
            self._buffered = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            message = f"the disk tier cannot open {path} ({error.strerror}); choose another disk_dir"
            raise TierError(message) from None
        try:
            self._lock()
            if not self._ours():
                self._start_over()
            self._direct = self._open_direct()
        except BaseException:
            os.close(self._buffered)
            raise

    @property
    def direct(self) -> bool:
        return self._direct is not None

    def close(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._buffered)

    # ------------------------------------------------------------------ blocks

    def headers(self) -> Iterator[tuple[int, Header]]:
        """(slot, header) of every slot that has a whole one."""
        table = bytearray(self.layout.slots * HEADER_BYTES)
        got = os.preadv(self._buffered, [table], self.layout.header_at(0))
        for slot in range(got // HEADER_BYTES):
            packed = bytes(table[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES])
            header = unpack_header(packed, slot)
            if header is not None and header.length == self.layout.slot_bytes:
                yield slot, header

    def write_header(self, slot: int, header: Header | None) -> None:
        """None: the slot holds no block. Raises OSError."""
        packed = NO_HEADER if header is None else pack_header(header, slot)
        _whole(os.pwrite(self._buffered, packed, self.layout.header_at(slot)), HEADER_BYTES)

    def write_body(self, slot: int, padded: memoryview) -> None:
        """`padded`: `stride` bytes, page-aligned. Raises OSError."""
        descriptor = self._buffered if self._direct is None else self._direct
        _whole(os.pwrite(descriptor, padded, self.layout.body_at(slot)), len(padded))

    def read_body(self, slot: int, view: memoryview) -> None:
        """Read one block into the start of `view`, as far as the file has it: the checksum tells. Raises OSError.

        A view of `stride` bytes on a page boundary, as the slab's slots are, is read into directly.
        """
        length = self.layout.slot_bytes
        if self._direct is not None and len(view) >= self.layout.stride and page_aligned(view):
            os.preadv(self._direct, [view[: self.layout.stride]], self.layout.body_at(slot))
        else:
            os.preadv(self._buffered, [view[:length]], self.layout.body_at(slot))

    # ------------------------------------------------------------------ start

    def _lock(self) -> None:
        try:
            fcntl.flock(self._buffered, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            message = f"{self.path} is in use by another kvstore; give each its own disk_dir"
            raise TierError(message) from None

    def _ours(self) -> bool:
        expected = self.layout.file_header()
        if os.fstat(self._buffered).st_size != self.layout.size:
            return False
        return os.pread(self._buffered, len(expected), 0) == expected

    def _start_over(self) -> None:
        """The header of the file comes last: until then the next start begins anew, too."""
        self.fresh = True
        try:
            os.ftruncate(self._buffered, 0)
            os.posix_fallocate(self._buffered, 0, self.layout.size)
            header = self.layout.file_header()
            _whole(os.pwrite(self._buffered, header, 0), len(header))
        except OSError as error:
            self.path.unlink(missing_ok=True)
            message = (
                f"the disk tier of {self.layout.size} bytes does not fit at {self.path} ({error.strerror}); "
                "make disk_bytes smaller or choose another disk_dir"
            )
            raise TierError(message) from None

    def _open_direct(self) -> int | None:
        """A descriptor that goes around the page cache; None where a real read of that kind fails."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        except OSError:
            return None
        with mmap.mmap(-1, PAGE) as page:
            try:
                os.preadv(descriptor, [page], self.layout.bodies)
            except OSError:
                os.close(descriptor)
                return None
        return descriptor


def page_aligned(view: memoryview) -> bool:
    """Whether the memory starts on a page boundary, as O_DIRECT wants it."""
    return bool(np.frombuffer(view, np.uint8).ctypes.data % PAGE == 0)


def _whole(written: int, length: int) -> None:
    if written != length:
        raise OSError(f"{written} of {length} bytes were written")
