"""The disk tier: what was put comes back, in bounded room, also after a restart."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.slab.host import PAGE, slot_stride
from services.kvstore.tiers.contract import TierError
from services.kvstore.tiers.disk import DiskTier
from services.kvstore.tiers.file import BlockFile
from services.kvstore.tiers.layout import Layout
from tests.kvstore.test_kvstore import rust_built
from tests.kvstore.tier_rig import (
    DIGEST,
    SLOT_BYTES,
    SLOTS,
    body_of,
    capacity,
    key_of,
    layout,
    put,
    reopen,
    right,
    slot,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def tier(path: Path) -> Iterator[DiskTier]:
    tier = reopen(path)
    yield tier
    tier.close()


# ---------------------------------------------------------------------- what was put comes back


def test_blocks_come_back_and_a_chain_ends_where_it_is_not_here(tier: DiskTier) -> None:
    keys = put(tier, 1, 2, 3)
    assert right(tier, keys) == 3
    assert right(tier, [*keys[:2], key_of(9), keys[2]]) == 2
    assert right(tier, [key_of(9), *keys]) == 0
    assert tier.leading([*keys, key_of(9)]) == 3
    assert [tier.contains(keys[0]), tier.contains(key_of(9))] == [True, False]
    counts = tier.counts()
    assert (counts.blocks, counts.hits, counts.bytes_written) == (3, 5, 3 * SLOT_BYTES)
    assert counts.bytes_read == 5 * SLOT_BYTES
    assert (counts.torn, counts.errors, counts.dropped) == (0, 0, 0)


def test_what_is_there_is_not_written_again(tier: DiskTier) -> None:
    put(tier, 1, 2)
    put(tier, 1, 2)
    assert tier.counts().bytes_written == 2 * SLOT_BYTES


def test_a_slot_of_the_slab_gets_the_block_and_nothing_of_another_behind_it(tier: DiskTier) -> None:
    [key] = put(tier, 1)
    view = slot()
    view[:] = b"\xff" * len(view)
    assert tier.get([key], [view]) == 1
    # Only O_DIRECT reads whole pages.
    behind = b"\0" if tier.direct else b"\xff"
    assert bytes(view[SLOT_BYTES:]) == behind * (len(view) - SLOT_BYTES)


def test_memory_that_is_not_aligned_is_read_into_as_well(tier: DiskTier) -> None:
    [key] = put(tier, 1)
    memory = memoryview(mmap.mmap(-1, 8 * PAGE))
    for view in (memory[7:], memory[7 : 7 + SLOT_BYTES], memory[:SLOT_BYTES]):
        assert tier.get([key], [view]) == 1
        assert bytes(view[:SLOT_BYTES]) == body_of(key)


def test_more_keys_than_views_are_not_read(tier: DiskTier) -> None:
    keys = put(tier, 1, 2)
    assert tier.get(keys, [slot()]) == 1


def test_a_view_of_another_size_is_refused_at_once(tier: DiskTier) -> None:
    with pytest.raises(ValueError, match=f"a block here is {SLOT_BYTES} bytes"):
        tier.put(key_of(1), b"", memoryview(bytes(SLOT_BYTES - 1)))


def test_a_block_whose_slot_was_given_away_while_it_waited_is_not_kept(tier: DiskTier) -> None:
    assert tier.put(key_of(1), b"", memoryview(body_of(key_of(1))), lambda: False)
    tier.flush()
    assert not tier.contains(key_of(1))
    assert tier.counts().dropped == 1
    # And nothing of it stays behind: the key can be put again.
    assert right(tier, put(tier, 1)) == 1


def test_the_bytes_are_read_before_it_is_asked_whether_they_are_still_right(tier: DiskTier) -> None:
    memory = bytearray(body_of(key_of(1)))

    def overwritten_afterwards() -> bool:
        memory[:] = bytes(SLOT_BYTES)
        return True

    tier.put(key_of(1), b"", memoryview(memory), overwritten_afterwards)
    tier.flush()
    assert right(tier, [key_of(1)]) == 1


def test_put_does_not_wait_for_the_disk_and_refuses_when_too_much_waits(path: Path) -> None:
    tier = reopen(path)
    tier.close()
    started, go_on = threading.Event(), threading.Event()

    def held_up() -> bool:
        started.set()
        return go_on.wait(30)

    tier = DiskTier(BlockFile(path, layout()), queue_blocks=2)
    tier.put(key_of(0), b"", memoryview(body_of(key_of(0))), held_up)
    assert started.wait(30)
    taken = [tier.put(key_of(name), b"", memoryview(body_of(key_of(name)))) for name in (1, 2, 3)]
    assert taken == [True, True, False]
    go_on.set()
    tier.flush()
    assert [tier.contains(key_of(name)) for name in range(4)] == [True, True, True, False]
    assert tier.counts().dropped == 1
    tier.close()


def test_a_view_that_was_let_go_does_not_end_the_tier(tier: DiskTier) -> None:
    view = memoryview(body_of(key_of(1)))
    started, go_on = threading.Event(), threading.Event()
    tier.put(key_of(0), b"", memoryview(body_of(key_of(0))), lambda: started.set() or go_on.wait(30))
    assert started.wait(30)
    tier.put(key_of(1), b"", view)
    view.release()
    go_on.set()
    tier.flush()
    assert tier.counts().errors == 1
    assert right(tier, put(tier, 2)) == 1


# ---------------------------------------------------------------------- bounded room


def test_the_file_never_grows_and_old_blocks_give_way(path: Path) -> None:
    changes: list[tuple[list[bytes], list[bytes]]] = []
    tier = DiskTier.open(path, capacity(SLOTS), SLOT_BYTES, DIGEST, lambda *change: changes.append(change))
    size = path.stat().st_size
    assert size <= capacity(SLOTS)
    assert path.stat().st_blocks * 512 >= size
    for name in range(0, 40, 2):
        assert right(tier, put(tier, name, name + 1)) == 2
    counts = tier.counts()
    assert (counts.blocks, counts.evicted) == (SLOTS, 40 - SLOTS)
    assert path.stat().st_size == size
    resident: set[bytes] = set()
    for stored, removed in changes:
        resident.difference_update(removed)
        resident.update(stored)
    assert resident == set(tier.keys())
    tier.close()


@pytest.mark.parametrize("slot_bytes", [1, SLOT_BYTES, 4096, 737_280])
def test_the_layout_uses_the_room_it_is_given_and_no_more(slot_bytes: int) -> None:
    for room in range(0, 20 * slot_stride(slot_bytes), 1237):
        fitting = Layout.fitting(room, slot_bytes, DIGEST)
        assert fitting.size <= room or not fitting.slots
        # What is left over is less than a slot and three pages.
        assert room - fitting.size < slot_stride(slot_bytes) + 128 + 3 * PAGE
        assert fitting.body_at(0) >= fitting.header_at(fitting.slots)
        assert fitting.body_at(0) % PAGE == 0


def test_children_give_way_before_their_parents_even_if_they_came_first(tier: DiskTier) -> None:
    keys = [key_of(name) for name in range(4)]
    for at in (3, 2, 1, 0):
        # As the slab evicts: leaves first.
        tier.put(keys[at], keys[at - 1] if at else b"", memoryview(body_of(keys[at])))
    tier.flush()
    for name in range(10, 10 + SLOTS - 1):
        put(tier, name)
        present = [tier.contains(key) for key in keys]
        assert present == sorted(present, reverse=True)
    assert not tier.contains(keys[1])


def test_what_is_read_again_outlives_what_was_seen_once(tier: DiskTier) -> None:
    often = put(tier, 1, 2)
    for _ in range(3):
        assert right(tier, often) == 2
    for name in range(10, 10 + 2 * SLOTS):
        put(tier, name)
    assert right(tier, often) == 2


def test_a_block_that_is_being_read_keeps_its_slot(tier: DiskTier) -> None:
    [key] = put(tier, 1)
    entry = tier._index.leading([key])
    tier._index.hold(entry)
    for name in range(10, 10 + 3 * SLOTS):
        put(tier, name)
    tier._index.release(entry)
    assert right(tier, [key]) == 1


# ---------------------------------------------------------------------- the next start


def test_a_restart_finds_the_blocks_and_goes_on(path: Path, tier: DiskTier) -> None:
    keys = put(tier, 1, 2, 3)
    tier.close()
    again = reopen(path)
    assert again.leading(keys) == 3
    # Its order of eviction too: the chain's leaf is the first to go, not its root.
    put(again, *range(10, 10 + SLOTS - 2))
    assert [again.contains(key) for key in keys] == [True, True, False]
    assert right(again, keys) == 2
    again.close()


@pytest.mark.parametrize("change", ["format", "capacity", "slot_bytes", "garbage", "shorter"])
def test_a_file_of_another_format_or_size_is_started_over(path: Path, tier: DiskTier, change: str) -> None:
    put(tier, 1)
    tier.close()
    digest, slots, slot_bytes = DIGEST, SLOTS, SLOT_BYTES
    if change == "format":
        digest = b"another digest.."
    elif change == "capacity":
        slots += 1
    elif change == "slot_bytes":
        slot_bytes += 1
    elif change == "garbage":
        path.write_bytes(os.urandom(path.stat().st_size))
    else:
        os.truncate(path, path.stat().st_size - 1)
    again = DiskTier.open(path, capacity(slots), slot_bytes, digest)
    assert again.keys() == []
    again.close()
    once_more = DiskTier.open(path, capacity(slots), slot_bytes, digest)
    assert not once_more._file.fresh
    once_more.close()


def test_two_kvstores_do_not_share_a_file(path: Path, tier: DiskTier) -> None:
    with pytest.raises(TierError, match="in use by another kvstore; give each its own disk_dir"):
        reopen(path)
    # The one that has it goes on.
    assert right(tier, put(tier, 1)) == 1


def test_what_was_accepted_is_written_before_it_closes_and_nothing_is_done_later(path: Path, tier: DiskTier) -> None:
    for name in range(5):
        tier.put(key_of(name), b"", memoryview(body_of(key_of(name))))
    tier.close()
    tier.close()
    assert not tier.put(key_of(9), b"", memoryview(body_of(key_of(9))))
    assert tier.get([key_of(1)], [slot()]) == 0
    again = reopen(path)
    assert sum(right(again, [key_of(name)]) for name in range(5)) == 5
    again.close()


# ---------------------------------------------------------------------- what it needs


def test_it_loads_nothing_built_in_rust(path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.kvstore.tier_rig import *\n"
        f"tier = reopen(Path({str(path)!r})); assert right(tier, put(tier, 1)) == 1\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    root = Path(__file__).parents[2]
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=root)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert "_xxhash" in Path(f"/proc/{process.pid}/maps").read_text()
        assert rust_built(process.pid) == []
    finally:
        process.communicate(b"")
