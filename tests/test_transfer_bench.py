"""The transfer benchmark measures what it says: right bytes, nothing left running, absent peers named, fair ratios."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.transfer.contract import MoverError, Sample, SkipError
from bench.transfer.memcpy import Memcpy
from bench.transfer.nixl_peer import nixl_tcp
from bench.transfer.raw_tcp import RawTcp
from bench.transfer.redis_peer import Redis
from bench.transfer.slabs import Slabs
from bench.transfer.summary import marks, over_raw_tcp, ratio


@pytest.fixture
def slabs() -> Iterator[Slabs]:
    slabs = Slabs(6)
    yield slabs
    slabs.close()


def children() -> list[str]:
    return Path("/proc/self/task", Path("/proc/thread-self").readlink().name, "children").read_text().split()


def test_memcpy_moves_the_scattered_slots_and_no_other(slabs: Slabs) -> None:
    with Memcpy(slabs) as mover:
        mover.tune([1, 4])
        mover.verify(4)


def test_a_wrong_slot_is_found(slabs: Slabs) -> None:
    with Memcpy(slabs) as mover:
        mover.move(4)
    slabs.target[slabs.target_slots[3], 4096] ^= 1
    with pytest.raises(MoverError, match=f"slot {slabs.target_slots[3]} of the target differs"):
        slabs.check_scattered(4)
    slabs.target[slabs.target_slots[5], 0] = 1
    with pytest.raises(MoverError, match="nobody asked for"):
        slabs.check_scattered(0)


def test_raw_tcp_moves_the_bytes_between_processes_and_leaves_none(slabs: Slabs) -> None:
    before = children()
    with RawTcp(slabs, sys.executable) as mover:
        mover.quick = True
        mover.tune([1, 4])
        mover.verify(4)
        sample = mover.move(4)
    assert sample.seconds > 0
    assert sample.cpu_source_s > 0
    assert sample.cpu_target_s > 0
    assert children() == before


def test_raw_tcp_by_four_connections(slabs: Slabs) -> None:
    with RawTcp(slabs, sys.executable) as mover:
        mover.ranked[5] = [c for c in mover.candidates() if dict(c.question)["connections"] == 4][:1]
        mover.verify(5)


def test_a_side_that_dies_is_an_error_with_its_name(slabs: Slabs) -> None:
    with RawTcp(slabs, sys.executable) as mover:
        mover.move(1)
        for side in mover._sides:
            side._process.kill()
            side._process.wait()
        with pytest.raises(MoverError, match="raw_tcp source: has ended"):
            mover.move(1)


def test_peers_without_a_python_of_their_own_are_skipped_with_the_reason(slabs: Slabs) -> None:
    with pytest.raises(SkipError, match="--peers-python"), nixl_tcp(slabs, None):
        pass
    with pytest.raises(SkipError), Redis(slabs, "/nowhere/python"):
        pass


def test_marks_are_the_worst_of_the_large_sizes_and_only_of_movers_that_ran() -> None:
    def taken(*seconds: float) -> list[Sample]:
        return [Sample(s, 0.01, 0.02) for s in seconds]

    samples = {
        1: {"socket": taken(1, 1, 1), "raw_tcp": taken(0.1, 0.1, 0.1)},
        64: {"socket": taken(1, 2, 4), "raw_tcp": taken(0.95, 1.9, 3.8)},
        512: {"socket": taken(1, 1, 1), "raw_tcp": taken(0.8, 2, 0.8)},
    }
    assert ratio(samples[64]["socket"], samples[64]["raw_tcp"]) == pytest.approx(0.95)
    found = marks(samples)
    assert set(found) == {"socket_vs_raw_tcp", "socket_cpu_s_per_gb"}
    assert found["socket_vs_raw_tcp"]["value"] == pytest.approx(0.8)
    assert not found["socket_vs_raw_tcp"]["holds"]
    assert over_raw_tcp(samples)["socket"] == {16: 0.1, 1024: 0.95, 8192: 0.8}
