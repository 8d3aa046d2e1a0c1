"""The host segment: new at each start, populated, mapped by descriptor, refused clearly."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from headway.slab import host
from headway.slab.host import PAGE, HostSegment, SlabError, map_descriptor, slot_stride


@pytest.fixture
def name() -> Iterator[str]:
    name = f"headway-test-{uuid.uuid4().hex[:8]}"
    yield name
    (host.SHM / name).unlink(missing_ok=True)


def test_slots_are_page_aligned() -> None:
    assert [slot_stride(used) for used in (1, PAGE, PAGE + 1)] == [PAGE, PAGE, 2 * PAGE]


def test_two_mappings_see_one_memory_and_it_starts_as_zeros(name: str) -> None:
    segment = HostSegment(name, 4 * PAGE)
    one, two = (map_descriptor(segment.descriptor, 2, 2 * PAGE) for _ in range(2))
    assert one.shape == (2, 2 * PAGE)
    assert not one.any()
    one[1, -1] = 7
    assert two[1, -1] == 7
    segment.remove()
    # Who maps it keeps it.
    assert one[1, -1] == 7
    assert not segment.path.exists()


def test_all_of_it_is_there_from_the_start(name: str) -> None:
    segment = HostSegment(name, 64 * PAGE)
    assert segment.path.stat().st_blocks * 512 == 64 * PAGE
    assert segment.path.stat().st_mode & 0o777 == 0o600
    assert not os.get_inheritable(segment.descriptor)
    segment.remove()


def test_a_new_segment_of_the_same_name_is_other_memory(name: str) -> None:
    former = HostSegment(name, PAGE)
    stale = map_descriptor(former.descriptor, 1, PAGE)
    os.close(former.descriptor)
    segment = HostSegment(name, PAGE)
    stale[:] = 9
    assert not map_descriptor(segment.descriptor, 1, PAGE).any()
    segment.remove()


@pytest.mark.parametrize("bad", ["", "../x", "a/b", "a b"])
def test_a_name_that_is_no_file_name_is_refused(bad: str) -> None:
    with pytest.raises(SlabError, match="slab_name"):
        HostSegment(bad, PAGE)


def test_too_little_shared_memory_is_refused_with_what_there_is(name: str) -> None:
    room = os.statvfs(host.SHM)
    with pytest.raises(SlabError, match=r"\d+ bytes free; make slab_bytes smaller"):
        HostSegment(name, (room.f_blocks + 1) * room.f_frsize)
    assert not (host.SHM / name).exists()


def test_too_little_memory_is_refused_with_what_there_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "available_memory", lambda: PAGE)
    with pytest.raises(SlabError, match=f"{PAGE} bytes of memory are available; make slab_bytes smaller"):
        HostSegment(name, 2 * PAGE)
    assert not (host.SHM / name).exists()


def test_a_segment_that_cannot_be_filled_leaves_no_file(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SlabError, match="slab_bytes"):
        HostSegment(name, PAGE)
    assert not (host.SHM / name).exists()


def test_the_kernel_says_how_much_memory_is_available() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < host.available_memory() <= total
