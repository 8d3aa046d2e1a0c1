"""The kvstore's own segment: what is written whole is read back, what is torn is not believed."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Iterator

import pytest

from headway.core.records import FREE, SEALED
from headway.slab.host import SlabError
from headway.slab.metadata import NOTES_BYTES, Metadata


@pytest.fixture
def name() -> Iterator[str]:
    name = f"headway-test-{uuid.uuid4().hex[:8]}"
    yield name
    (Metadata(name)).remove()


def reopened(metadata: Metadata, name: str) -> Metadata:
    """As the next process finds it."""
    let_go(metadata)
    return Metadata(name)


def let_go(metadata: Metadata) -> None:
    """As the end of its process does."""
    fcntl.flock(metadata._descriptor, fcntl.LOCK_UN)
    os.close(metadata._descriptor)


def test_the_last_notes_count(name: str) -> None:
    metadata = Metadata(name)
    assert metadata.read_notes() is None
    for number in range(5):
        metadata.write_notes({"number": number})
    again = reopened(metadata, name)
    assert again.read_notes() == {"number": 4}
    again.write_notes({"number": 5})
    last = reopened(again, name)
    assert last.read_notes() == {"number": 5}
    let_go(last)


@pytest.mark.parametrize("at", [0, 9, 17, 30])
def test_torn_notes_are_not_believed_and_the_ones_before_are(name: str, at: int) -> None:
    metadata = Metadata(name)
    metadata.write_notes({"number": 1})
    metadata.write_notes({"number": 2})
    newest = 2 % 2 * NOTES_BYTES
    os.pwrite(metadata._descriptor, bytes([255, 255]), newest + at)
    again = reopened(metadata, name)
    assert again.read_notes() == {"number": 1}
    let_go(again)


def test_records_are_read_back(name: str) -> None:
    metadata = Metadata(name)
    records = metadata.records(100, fresh=True)
    assert {records.states[slot] for slot in range(100)} == {FREE}
    records.seal(7, b"k" * 16, None)
    records.seal(99, b"m" * 16, 7)
    records.generations[99] = 1 << 40
    assert metadata.has_records(100)
    assert not metadata.has_records(101)
    again = reopened(metadata, name)
    records = again.records(100, fresh=False)
    assert records.block(7) == (b"k" * 16, None)
    assert records.block(99) == (b"m" * 16, 7)
    assert [slot for slot in range(100) if records.states[slot] == SEALED] == [7, 99]
    assert records.generations[99] == 1 << 40
    let_go(again)


def test_two_processes_cannot_have_one_slab(name: str) -> None:
    metadata = Metadata(name)
    with pytest.raises(SlabError, match="another kvstore uses the slab"):
        Metadata(name)
    let_go(metadata)


def test_too_long_notes_are_refused(name: str) -> None:
    metadata = Metadata(name)
    with pytest.raises(SlabError, match="too many workers"):
        metadata.write_notes({"long": "x" * NOTES_BYTES})
    let_go(metadata)
