"""A kvstore that starts again after it was killed: the slab and what was known of it, if both are still there."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from headway.core.model import KvFormat, LayerGroup
from headway.core.records import Records
from headway.core.restore import restore
from headway.core.store import Store
from headway.slab.host import HostSegment, slot_stride
from headway.slab.metadata import Metadata

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FormerWorker:
    """A process that had mapped the slab: by pid and start time (clock ticks since boot), as pids come again."""

    incarnation: str
    worker_id: str
    pid: int
    started: int

    def open(self) -> int | None:
        """A pidfd of it, None when it is dead."""
        with contextlib.suppress(OSError):
            descriptor = os.pidfd_open(self.pid)
            if started_at(self.pid) == self.started:
                return descriptor
            os.close(descriptor)
        return None


def started_at(pid: int) -> int:
    """Clock ticks since boot at which the process started. OSError when there is none."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])


class Keeper:
    """Slab and metadata of one kvstore. `segment` is that of the former process where that can be used, else new."""

    def __init__(self, name: str, size: int) -> None:
        """Raises SlabError."""
        self._metadata = Metadata(name)
        self._notes = self._metadata.read_notes() or {}
        try:
            self.segment = HostSegment(name, size, inode=self._notes.get("inode") if self._usable(size) else None)
        except BaseException:
            self._metadata.remove()
            raise
        if not self.segment.reused:
            self._notes = {}
        # Those of the former process stay noted until they are known to be dead, whatever happens to this one.
        self._workers = {worker.incarnation: worker for worker in self.former_workers()}

    def _usable(self, size: int) -> bool:
        notes = self._notes
        return bool(notes) and notes["bytes"] == size and self._metadata.has_records(notes["slots"])

    @property
    def kv_format(self) -> KvFormat | None:
        """Of the blocks that are there from before; None when there are none."""
        return _format_from_notes(self._notes["kv_format"]) if self._notes else None

    def former_workers(self) -> list[FormerWorker]:
        """Processes that may still be writing to the slab."""
        return [FormerWorker(*worker) for worker in self._notes.get("workers", ())]

    def restored(self, handoff_hold_s: float, former: list[str]) -> Store:
        """The store as it was, `former` sessions being those that may still write."""
        slots, kv_format = self._notes["slots"], self.kv_format
        assert kv_format is not None
        store = restore(self._metadata.records(slots, fresh=False), kv_format.block_size, handoff_hold_s, former)
        log.info(
            "event=restored blocks=%d slots=%d quarantined=%d", len(store.cache), slots, store.counts()["quarantined"]
        )
        return store

    def lay_out(self, kv_format: KvFormat) -> Records:
        """Records of a slab with this format, all slots free."""
        slots = self.segment.size // slot_stride(kv_format.slot_bytes)
        records = self._metadata.records(slots, fresh=True)
        self._notes = {
            "inode": self.segment.inode,
            "bytes": self.segment.size,
            "slots": slots,
            "kv_format": _format_to_notes(kv_format),
        }
        self._write()
        return records

    def keep(self, worker: FormerWorker) -> None:
        """From now on this process may write to the slab."""
        self._workers[worker.incarnation] = worker
        self._write()

    def forget(self, incarnation: str) -> None:
        """It writes no more."""
        if self._workers.pop(incarnation, None) is not None:
            self._write()

    def remove(self) -> None:
        """The clean end: nothing is left, but what workers still map."""
        self.segment.remove()
        self._metadata.remove()

    def _write(self) -> None:
        workers = [astuple(worker) for worker in self._workers.values()]
        self._metadata.write_notes({**self._notes, "workers": workers})


def _format_to_notes(kv_format: KvFormat) -> list[Any]:
    groups = [
        [g.layers, g.kv_heads, g.head_dim, g.bytes_per_token, g.window, g.shard, g.shards] for g in kv_format.groups
    ]
    return [kv_format.block_size, kv_format.dtype, kv_format.order, groups]


def _format_from_notes(notes: list[Any]) -> KvFormat:
    block_size, dtype, order, groups = notes
    return KvFormat(block_size, dtype, order, tuple(LayerGroup(*group) for group in groups))
