"""The disk tier: what was put comes back whole or not at all, in bounded room, whatever happens in between."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.kvstore.tiers.contract import TierError
from services.kvstore.tiers.disk import DiskTier
from services.kvstore.tiers.layout import HEADER_BYTES, Layout
from tests.kvstore.tier_rig import DIGEST, SLOT_BYTES, body_of, capacity, key_of, put, right, slot

ROOT = Path(__file__).parents[2]
SLOTS = 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def tier(path: Path) -> Iterator[DiskTier]:
    tier = reopen(path)
    yield tier
    tier.close()


def reopen(path: Path, slots: int = SLOTS, digest: bytes = DIGEST) -> DiskTier:
    return DiskTier.open(path, capacity(slots), SLOT_BYTES, digest)


def layout(slots: int = SLOTS) -> Layout:
    return Layout(DIGEST, SLOT_BYTES, slots)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def slot_of(tier: DiskTier, key: bytes) -> int:
    entry = tier._index.get(key)
    assert entry is not None
    return entry.slot


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
    memory = memoryview(bytearray(SLOT_BYTES + 9))
    for view in (memory[7 : 7 + SLOT_BYTES], memory[:SLOT_BYTES]):
        assert tier.get([key], [view]) == 1
        assert bytes(view) == body_of(key)


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

    tier = DiskTier(tier._file.__class__(path, layout()), queue_blocks=2)
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
    with pytest.raises(TierError, match="in use by another kvstore; give each its own disk_path"):
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


# ---------------------------------------------------------------------- torn and killed


@pytest.mark.parametrize("at", [0, 1, SLOT_BYTES // 2, SLOT_BYTES - 1])
@pytest.mark.parametrize("restart", [False, True])
def test_a_flipped_bit_makes_a_miss_and_never_wrong_bytes(path: Path, tier: DiskTier, at: int, restart: bool) -> None:
    keys = put(tier, 1, 2, 3)
    offset = layout().body_at(slot_of(tier, keys[1])) + at
    with path.open("rb") as file:
        file.seek(offset)
        flipped = bytes([file.read(1)[0] ^ 1])
    if restart:
        tier.close()
    overwrite(path, offset, flipped)
    victim = reopen(path) if restart else tier
    assert right(victim, keys) == 1
    assert victim.counts().torn == 1
    assert [victim.contains(key) for key in keys] == [True, False, True]
    # Put again, the chain is whole again.
    put(victim, 2, parent=keys[0])
    assert right(victim, keys) == 3
    victim.close()


def test_garbage_and_headers_in_the_wrong_place_are_no_blocks(path: Path, tier: DiskTier) -> None:
    keys = put(tier, 1, 2, 3)
    slots = [slot_of(tier, key) for key in keys]
    tier.close()
    headers = path.read_bytes()[layout().header_at(0) : layout().bodies]
    of = [headers[at * HEADER_BYTES : (at + 1) * HEADER_BYTES] for at in slots]
    overwrite(path, layout().header_at(slots[1]), of[0])
    overwrite(path, layout().header_at(slots[2]), of[2][:8] + b"?" + of[2][9:])
    overwrite(path, layout().header_at(7), random.Random(1).randbytes(HEADER_BYTES))
    again = reopen(path)
    assert again.keys() == [keys[0]]
    assert right(again, keys) == 1
    again.close()


def test_a_header_never_vouches_for_the_body_of_another_generation(path: Path, tier: DiskTier) -> None:
    keys = put(tier, 1, 2)
    first, second = (layout().body_at(slot_of(tier, key)) for key in keys)
    tier.close()
    data = path.read_bytes()
    overwrite(path, first, data[second : second + SLOT_BYTES])
    again = reopen(path)
    assert right(again, keys) == 0
    assert again.counts().torn == 1
    again.close()


def test_a_file_that_is_cut_short_under_a_running_tier_gives_misses(path: Path, tier: DiskTier) -> None:
    keys = put(tier, 1, 2)
    os.truncate(path, layout().body_at(slot_of(tier, keys[1])) + 10)
    assert right(tier, keys) == 1
    assert tier.counts().torn == 1


@pytest.mark.parametrize("after", [0, 1, 2, 3])
@pytest.mark.parametrize("part", [0, 40])
def test_stopped_between_any_two_writes_a_slot_holds_a_whole_block_or_none(
    path: Path, monkeypatch: pytest.MonkeyPatch, after: int, part: int
) -> None:
    """A full tier replaces a block, and ends after `after` writes and `part` bytes of the next."""
    tier = reopen(path, 1)
    old = put(tier, 1)
    pwrite, done = os.pwrite, 0

    def dying(descriptor: int, data: bytes | memoryview, offset: int) -> int:
        nonlocal done
        done += 1
        if done > after:
            overwrite(path, offset, bytes(data[:part]))
            raise OSError("dead")
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", dying)
    put(tier, 2)
    monkeypatch.undo()
    assert done == min(after + 1, 3)
    tier.close()
    again = reopen(path, 1)
    untouched = after == 0 and part == 0
    assert [again.contains(old[0]), again.contains(key_of(2))] == [untouched, after == 3]
    assert [right(again, old), right(again, [key_of(2)])] == [untouched, after == 3]
    # The block that was being replaced is not even claimed once its body may be touched.
    assert again.counts().torn == 0
    again.close()


def test_after_kill_9_at_any_moment_what_is_read_is_right(path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kvstore.tier_rig", str(path), "24"]
    found, delays = 0, random.Random(7)
    for _ in range(6):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT, env=environment)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"writing\n"
            threading.Event().wait(delays.uniform(0, 0.15))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        tier = reopen(path, 24)
        assert not tier._file.fresh
        keys = tier.keys()
        assert len(keys) >= 4
        found += sum(right(tier, [key]) for key in keys)
        # A kill, unlike a power cut, takes nothing from the kernel: no header without its whole body.
        assert tier.counts().torn == 0
        tier.close()
    assert found > 24


# ---------------------------------------------------------------------- disks that refuse


def test_a_full_disk_is_one_clear_sentence_and_leaves_no_file(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can mount a small tmpfs to fill")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small tmpfs here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(TierError, match=r"does not fit at .* \(No space left on device\); make disk_bytes smaller"):
            reopen(folder / "tier", 100)
        assert list(folder.iterdir()) == []
        # A file system without O_DIRECT, if this tmpfs is one, is used through the page cache.
        tier = reopen(folder / "tier", 8)
        assert right(tier, put(tier, 1, 2)) == 2
        tier.close()
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_folder_that_is_not_there_and_room_for_no_block_are_clear_sentences(tmp_path: Path) -> None:
    with pytest.raises(TierError, match="choose another disk_path"):
        reopen(tmp_path / "none" / "tier")
    with pytest.raises(TierError, match="disk_bytes is 4096"):
        DiskTier.open(tmp_path / "tier", 4096, SLOT_BYTES, DIGEST)


def test_without_o_direct_the_page_cache_serves(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refusing(name: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    tier = reopen(path)
    assert not tier.direct
    keys = put(tier, 1, 2, 3)
    assert right(tier, keys) == 3
    tier.close()
    monkeypatch.undo()
    # The same file, whichever way it is read.
    again = reopen(path)
    assert right(again, keys) == 3
    again.close()


def test_a_disk_that_fails_writes_is_given_up_after_a_few(
    tier: DiskTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = put(tier, 1)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pwrite", broken)
    for name in (2, 3, 4):
        put(tier, name)
    assert not tier.put(key_of(5), b"", memoryview(body_of(key_of(5))))
    assert tier.counts().errors == 3
    assert sum("disk_tier_off" in record.message for record in caplog.records) == 1
    # What it has can still be read, and no slot is lost.
    assert right(tier, keys) == 1
    assert tier._index.free == SLOTS - 1


def test_a_read_error_is_a_miss(tier: DiskTier, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = put(tier, 1)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    assert tier.get(keys, [slot()]) == 0
    monkeypatch.undo()
    assert tier.counts().errors == 1
    assert tier._index.free == SLOTS


# ---------------------------------------------------------------------- many at once


def test_readers_and_writers_at_once_never_see_wrong_bytes(tier: DiskTier) -> None:
    """Thrice as many blocks as slots, so that slots change hands all the time."""
    stop, wrong, hits = threading.Event(), [], 0
    names = range(3 * SLOTS)

    def read(seed: int) -> None:
        nonlocal hits
        draw, view = random.Random(seed), slot()
        while not stop.is_set():
            key = key_of(draw.choice(names))
            if tier.get([key], [view]):
                hits += 1
                if bytes(view[:SLOT_BYTES]) != body_of(key):
                    wrong.append(key)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    draw = random.Random(9)
    for _ in range(400):
        put(tier, draw.choice(names))
    stop.set()
    for reader in readers:
        reader.join()
    counts = tier.counts()
    assert wrong == []
    assert hits
    assert (counts.torn, counts.errors) == (0, 0)
    assert counts.evicted > SLOTS
    assert tier._index.free + len(tier.keys()) == SLOTS
