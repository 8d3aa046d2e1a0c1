"""Recount a store: every slot in exactly one place, every hold and child counted, nothing held by nobody."""

from __future__ import annotations

from collections import Counter

from headway.core.store import Store


def check_integrity(store: Store) -> list[str]:
    """Everything that is wrong, a sentence each; empty when all is well."""
    return [*_wrong_places(store), *_wrong_holds(store)]


def _wrong_places(store: Store) -> list[str]:
    places: list[tuple[int, str]] = [(slot, "free") for slot in store.pool.free_slots()]
    places += [(block.slot, f"sealed as {block.key.hex()}") for block in store.cache]
    for lease in store.leases.values():
        private = [*lease.own, *(slot for losers in lease.losers.values() for slot in losers)]
        places += [(slot, f"of lease {lease.lease_id}") for slot in private]
    wrong: list[str] = []
    seen: dict[int, str] = {}
    for slot, place in places:
        if slot in seen:
            wrong.append(f"slot {slot} is both {seen[slot]} and {place}")
        seen[slot] = place
    counts = store.counts()
    if len(seen) != store.pool.total or sum(counts.values()) != store.pool.total:
        wrong.append(f"{len(seen)} of {store.pool.total} slots are accounted for: {counts}")
    return wrong


def _wrong_holds(store: Store) -> list[str]:
    wrong: list[str] = []
    holds: Counter[bytes] = Counter()
    for lease in store.leases.values():
        holds.update(block.key for block in lease.blocks)
        if any(lease.slots[at] != block.slot for at, block in enumerate(lease.blocks)):
            wrong.append(f"lease {lease.lease_id} has a block in another slot than the cache")
        if not lease.live and not lease.suspended:
            wrong.append(f"lease {lease.lease_id} is held by nobody")
    children = Counter(block.parent.key for block in store.cache if block.parent is not None)
    for block in store.cache:
        name = block.key.hex()
        if block.parent is not None and store.cache.get(block.parent.key) is not block.parent:
            wrong.append(f"block {name} outlived its parent")
        if block.holds != holds[block.key] or block.children != children[block.key]:
            wrong.append(f"block {name} counts {block.holds} holds and {block.children} children wrongly")
    if store.cache.idle != sum(1 for block in store.cache if not block.holds):
        wrong.append(f"{store.cache.idle} blocks are counted idle")
    return wrong
