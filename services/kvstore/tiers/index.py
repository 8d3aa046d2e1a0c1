"""What lies in which slot of a tier's file, and what gives way: the slab's policy, for blocks that may lack parents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field

from headway.core.evict import AgedLfu, Policy, Resident
from services.kvstore.tiers.layout import Header


@dataclass(slots=True, eq=False)
class Entry(Resident):
    """A block in a slot. `parent` is None while it is not here: the slab evicts children first, so they come first.

    `holds`: reads that go on; `gone`: taken out while being read, so its slot is free when the last read ends.
    """

    slot: int = 0
    parent_key: bytes = b""
    generation: int = 0
    checksum: int = 0
    parent: Entry | None = None
    children: dict[bytes, Entry] = field(default_factory=dict)
    holds: int = 0
    gone: bool = False


class SlotIndex:
    """Every slot is free, taken by a writer, or of one entry. Not locked: the caller does that."""

    def __init__(self, slots: int, taken: Set[int] = frozenset()) -> None:
        self.evicted = 0
        self._free = [slot for slot in range(slots - 1, -1, -1) if slot not in taken]
        self._entries: dict[bytes, Entry] = {}
        self._orphans: dict[bytes, dict[bytes, Entry]] = {}
        self._policy: Policy = AgedLfu()
        self._clock = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def free(self) -> int:
        return len(self._free)

    def get(self, key: bytes) -> Entry | None:
        return self._entries.get(key)

    def __iter__(self) -> Iterator[Entry]:
        """Oldest first."""
        return iter(self._entries.values())

    def leading(self, keys: Iterable[bytes]) -> list[Entry]:
        found: list[Entry] = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                break
            found.append(entry)
        return found

    def take_slot(self) -> tuple[int, Entry | None] | None:
        """A slot to write into, and the leaf that gave way for it; None when all are being read or written."""
        if self._free:
            return self._free.pop(), None
        victim = self._policy.take()
        if victim is None:
            return None
        entry = self._entries[victim.key]
        self._unlink(entry)
        self.evicted += 1
        return entry.slot, entry

    def give_slot(self, slot: int) -> None:
        """The writer does not use it."""
        self._free.append(slot)

    def add(self, key: bytes, parent_key: bytes, slot: int, generation: int, checksum: int) -> Entry:
        """The block is written: its slot, taken before, is the new entry's. It counts as used once."""
        entry = Entry(key, slot=slot, parent_key=parent_key, generation=generation, checksum=checksum)
        self._entries[key] = entry
        entry.children = self._orphans.pop(key, {})
        for child in entry.children.values():
            child.parent = entry
        parent = self._entries.get(parent_key)
        if parent is not None:
            entry.parent = parent
            parent.children[key] = entry
            self._policy.withdraw(parent)
        elif parent_key:
            self._orphans.setdefault(parent_key, {})[key] = entry
        self.touch([entry])
        return entry

    def touch(self, entries: Sequence[Entry]) -> None:
        """These blocks of one chain, parents first, were used."""
        self._clock += 1
        for entry in entries:
            entry.uses += 1
            entry.last_use = self._clock
        self._policy.used(entries)
        for entry in reversed(entries):
            self._offer(entry)

    def hold(self, entries: Iterable[Entry]) -> None:
        """They are being read: their slots stay as they are."""
        for entry in entries:
            entry.holds += 1
            self._policy.withdraw(entry)

    def release(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            entry.holds -= 1
            if entry.gone and not entry.holds:
                self._free.append(entry.slot)
            self._offer(entry)

    def remove(self, entry: Entry) -> bool:
        """The block is no good. Its slot is free when nobody reads it. False when it was removed before."""
        if entry.gone:
            return False
        entry.gone = True
        self._policy.withdraw(entry)
        self._unlink(entry)
        if not entry.holds:
            self._free.append(entry.slot)
        return True

    def _unlink(self, entry: Entry) -> None:
        del self._entries[entry.key]
        if entry.parent is not None:
            del entry.parent.children[entry.key]
            self._offer(entry.parent)
        elif (orphans := self._orphans.get(entry.parent_key)) is not None:
            orphans.pop(entry.key, None)
            if not orphans:
                del self._orphans[entry.parent_key]
        if entry.children:
            # Only a block that is no good goes before its children; they wait for it to come again.
            for child in entry.children.values():
                child.parent = None
            self._orphans[entry.key] = entry.children

    def _offer(self, entry: Entry) -> None:
        if not entry.gone and not entry.holds and not entry.children:
            self._policy.offer(entry)


def rebuild(slots: int, found: Iterable[tuple[int, Header]]) -> tuple[SlotIndex, int]:
    """The index of what a file's headers say, in the order in which it was put; and the last generation."""
    in_order = sorted(found, key=lambda item: item[1].generation)
    youngest = {header.key: (slot, header) for slot, header in in_order}
    index, last = SlotIndex(slots, {slot for slot, _ in youngest.values()}), 0
    for slot, header in sorted(youngest.values(), key=lambda item: item[1].generation):
        index.add(header.key, header.parent, slot, header.generation, header.checksum)
        last = header.generation
    return index, last
