"""A store as it was, from records that outlived its process."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from headway.core.blocks import Block
from headway.core.records import SEALED, TAKEN, Records
from headway.core.store import Store


def restore(records: Records, block_size: int, handoff_hold_s: float, former: Iterable[str]) -> Store:
    """Sealed blocks are cached again, those without their parents excepted. Every slot that somebody may have been
    writing to is quarantined until all sessions of the `former` epoch have attached again or died.
    """
    store = Store(records, block_size, handoff_hold_s)
    children: dict[int | None, list[int]] = defaultdict(list)
    states = [records.states[slot] for slot in range(store.pool.total)]
    sealed = [slot for slot, state in enumerate(states) if state == SEALED]
    for slot in sealed:
        children[records.block(slot)[1]].append(slot)
    blocks = _grow(store, records, children)
    for block in blocks:
        store.cache.drop([block])
    store.pool.give(set(sealed) - {block.slot for block in blocks})
    taken = [slot for slot, state in enumerate(states) if state == TAKEN]
    if suspended := set(former):
        store.quarantine(taken, suspended)
    else:
        store.pool.give(taken)
    return store


def _grow(store: Store, records: Records, children: dict[int | None, list[int]]) -> list[Block]:
    """Blocks from the roots on, parents before children, each held once."""
    blocks: list[Block] = []
    grown: list[tuple[int, Block | None]] = [(slot, None) for slot in children[None]]
    while grown:
        slot, parent = grown.pop()
        key = records.block(slot)[0]
        if store.cache.get(key) is None:
            block = store.cache.add(key, slot, parent)
            blocks.append(block)
            grown += [(child, block) for child in children[slot]]
    return blocks
