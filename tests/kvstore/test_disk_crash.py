"""The disk tier: whatever happens to it or its disk, a block is read whole or not at all."""

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
from services.kvstore.tiers.layout import HEADER_BYTES
from tests.kvstore.tier_rig import (
    DIGEST,
    SLOT_BYTES,
    SLOTS,
    body_of,
    key_of,
    layout,
    put,
    reopen,
    right,
    slot,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def tier(path: Path) -> Iterator[DiskTier]:
    tier = reopen(path)
    yield tier
    tier.close()


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def slot_of(tier: DiskTier, key: bytes) -> int:
    entry = tier._index.get(key)
    assert entry is not None
    return entry.slot


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


def test_a_body_in_the_wrong_slot_is_not_served(path: Path, tier: DiskTier) -> None:
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
    with pytest.raises(TierError, match="choose another disk_dir"):
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
