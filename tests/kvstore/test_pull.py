"""Fetching blocks between two real kvstores, with faults in every phase: right bytes or none, and no slot lost."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from headway.core.keys import block_keys, join_keys
from headway.core.model import KvFormat, LayerGroup
from headway.v1 import kvstore_pb2 as pb
from tests.kvstore.faulty import Fault
from tests.kvstore.pulling import BLOCK, NAMESPACE, SLOT_BYTES, SLOTS, WIDE, Pair, acquire, pair
from tests.kvstore.rig import attached, release, rust_built, slab_file, stats, until

FORTY = list(range(40 * BLOCK))
TAIL = 7


@pytest.fixture
async def two(tmp_path: Path) -> AsyncIterator[Pair]:
    async with pair(tmp_path) as two:
        yield two


async def all_free(two: Pair) -> None:
    """No lease, no pin, no slot out of place, at either store."""
    for side in (two.source, two.reader):
        figures = await until(side.address, lambda reply: not reply.leases and not reply.transfers_in_flight)
        assert figures.free_slots + figures.cached_slots == SLOTS


async def test_a_prefix_comes_with_its_bytes(two: Pair) -> None:
    await two.source.compute(FORTY)
    lease_id, pulled = await two.fetch([*FORTY, 1])
    assert pulled.cached_tokens == len(FORTY)
    assert pulled.bytes == 40 * SLOT_BYTES
    (peer,) = (await two.reader.stats()).peers
    assert (peer.plane, peer.node_id, peer.blocks, peer.fallbacks) == ("socket", "source", 40, 0)
    assert two.data.passed > 40 * SLOT_BYTES
    assert rust_built(two.source.process.pid) == rust_built(two.reader.process.pid) == []
    await two.reader.worker.run(release(lease_id))
    await all_free(two)


async def test_what_is_here_already_is_not_fetched(two: Pair) -> None:
    await two.source.compute(FORTY)
    await two.reader.compute(FORTY[: 10 * BLOCK])
    _, pulled = await two.fetch([*FORTY, 1])
    assert pulled.cached_tokens == len(FORTY)
    assert pulled.bytes == 30 * SLOT_BYTES


async def test_a_hint_that_is_wrong_costs_nothing_but_the_try(two: Pair) -> None:
    await two.source.compute(FORTY[: 4 * BLOCK])
    lease_id, pulled = await two.fetch([*FORTY, 1])
    assert pulled.cached_tokens == 4 * BLOCK
    await two.reader.worker.run(release(lease_id))
    _, nothing = await two.fetch([9, *FORTY])
    assert nothing.cached_tokens == 0


async def test_an_address_without_a_store_is_given_up_soon(two: Pair) -> None:
    pull = pb.PullBlocks(kvstore="127.0.0.1:1", blocks=40)
    started = time.monotonic()
    (granted,) = await two.reader.worker.run(acquire([*FORTY, 1], pull=pull))
    assert (await two.reader.pulled(granted.granted.lease_id)).cached_tokens == 0
    assert time.monotonic() - started < 8


# One block ahead, and 64.
PROBE = 65 << 15
PHASES = {
    "first byte": 2,
    "probe": PROBE // 2 - 100_000,
    "first block": PROBE + 5000,
    "last blocks": PROBE + (38 << 15),
}


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("after", PHASES.values(), ids=PHASES.keys())
async def test_a_plane_that_fails_is_replaced_by_the_next(two: Pair, fault: Fault, after: int) -> None:
    """Whatever happens to the socket plane, and whenever: all blocks come, and all are right."""
    await two.source.compute(FORTY)
    two.data.arm(fault, after)
    lease_id, pulled = await two.fetch([*FORTY, 1])
    assert two.data.struck
    figures = await two.reader.stats()
    (peer,) = figures.peers
    in_the_probe = after <= PHASES["probe"]
    if fault is Fault.FLIP:
        # Thrown away, and fetched again by the second try. (A probe's blocks all land in one place.)
        assert figures.corrupt_blocks == (not in_the_probe)
    else:
        assert peer.plane == "grpc"
        assert peer.fallbacks == (not in_the_probe)
    assert pulled.cached_tokens == len(FORTY)
    await two.reader.worker.run(release(lease_id))
    await all_free(two)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_source_that_dies_or_hangs_ends_the_pull(two: Pair, how: signal.Signals) -> None:
    await two.source.compute(FORTY)
    two.data.arm(Fault.STALL, PROBE + (20 << 15))
    fetching = asyncio.create_task(two.fetch([*FORTY, 1]))
    async with asyncio.timeout(20):
        while not two.data.struck:
            await asyncio.sleep(0.01)
    two.source.process.signal(how)
    lease_id, pulled = await fetching
    assert pulled.cached_tokens < len(FORTY)
    await two.reader.worker.run(release(lease_id))
    figures = await until(two.reader.address, lambda reply: not reply.leases)
    assert figures.free_slots + figures.cached_slots == SLOTS
    assert figures.cached_slots == pulled.cached_tokens // BLOCK


async def test_a_source_that_came_back_with_another_layout_gives_nothing(two: Pair) -> None:
    await two.source.compute(FORTY)
    await two.fetch([*FORTY[: 5 * BLOCK], 1], request="first")
    two.source.process.signal(signal.SIGKILL)
    two.source.process.wait_ended(time.monotonic() + 5)
    slab_file(two.source.process).unlink()
    two.source.process.start()
    two.source.process.wait_listening(time.monotonic() + 30)
    other = KvFormat(BLOCK, "uint64", "token", (LayerGroup(1, 128, 1, 1024),))
    async with attached(two.source.address, "other", kv_format=other):
        _, pulled = await two.fetch([*FORTY, 1], request="second")
    assert pulled.cached_tokens == 5 * BLOCK
    assert not (await stats(two.source.address)).leases


async def test_a_request_that_ends_ends_its_fetching(two: Pair) -> None:
    await two.source.compute(FORTY)
    two.data.arm(Fault.STALL, PROBE + (20 << 15))
    pull = pb.PullBlocks(kvstore=two.via, blocks=40)
    (granted,) = await two.reader.worker.run(acquire([*FORTY, 1], pull=pull))
    await two.reader.worker.run(release(granted.granted.lease_id))
    await all_free(two)


async def test_slots_are_not_given_out_while_bytes_may_still_arrive(two: Pair) -> None:
    """The only lease is released while its blocks stall on their way: its slots stay leased until the plane gave up."""
    await two.source.compute(FORTY)
    two.data.arm(Fault.STALL, PROBE + (20 << 15))
    pull = pb.PullBlocks(kvstore=two.via, blocks=40)
    (granted,) = await two.reader.worker.run(acquire([*FORTY, 1], pull=pull))
    async with asyncio.timeout(20):
        while not two.data.struck:
            await asyncio.sleep(0.01)
    await two.reader.worker.run(release(granted.granted.lease_id))
    assert (await two.reader.stats()).leased_slots
    await all_free(two)


async def test_blocks_that_the_source_needs_itself_before_they_are_read_are_thrown_away(two: Pair) -> None:
    """Where they lie is told, but the reader hears of it only when the source has taken most of them back."""
    await two.source.compute(FORTY)
    lease_id, _ = await two.fetch(FORTY[: BLOCK + 1], request="connects")
    await two.reader.worker.run(release(lease_id))
    two.control.arm(Fault.STALL, 0)
    younger = acquire([*FORTY, 1], pull=pb.PullBlocks(kvstore=two.via, blocks=40))
    younger.acquire.arrival_s = 1.0
    (granted,) = await two.reader.worker.run(younger)
    await until(two.source.address, lambda reply: reply.leases)
    await two.source.compute([token + 1 for token in FORTY], "other")
    two.control.resumed.set()
    lease_id = granted.granted.lease_id
    pulled = await two.reader.pulled(lease_id)
    two.reader.check(list(pulled.slots), FORTY, pulled.cached_tokens)
    assert pulled.cached_tokens < len(FORTY)
    assert (await two.reader.stats()).stale_blocks
    await two.reader.worker.run(release(lease_id))
    await all_free(two)


async def test_a_worker_that_dies_ends_its_fetching(two: Pair) -> None:
    await two.source.compute(FORTY)
    two.data.arm(Fault.STALL, PROBE + (20 << 15))
    async with attached(two.reader.address, "short-lived", kv_format=WIDE) as short:
        await short.run(acquire([*FORTY, 1], pull=pb.PullBlocks(kvstore=two.via, blocks=40)))
    await all_free(two)


# ---------------------------------------------------------------------- handoff


async def arrived(two: Pair, blocks: int) -> None:
    await until(two.reader.address, lambda reply: sum(peer.blocks for peer in reply.peers) == blocks)


async def follow(two: Pair, tokens: list[int], request: str) -> int:
    pull = pb.PullBlocks(kvstore=two.via, follow=True)
    (granted,) = await two.reader.worker.run(acquire(tokens, request, pull=pull))
    await until(two.reader.address, lambda reply: any(peer.plane for peer in reply.peers))
    lease_id: int = granted.granted.lease_id
    return lease_id


@pytest.mark.parametrize("early", [True, False])
async def test_a_handed_off_sequence_comes_with_its_partial_block(two: Pair, early: bool) -> None:
    """Whether the reader follows before the sequence is computed or only after its handoff."""
    tokens = FORTY[: 10 * BLOCK + TAIL]
    if early:
        lease_id = await follow(two, tokens, "s")
        await asyncio.sleep(0.1)
    await two.source.compute(tokens, "s", joiner="@reader", hand_off=True)
    if not early:
        assert (await two.source.stats()).leases == 1
        lease_id = await follow(two, tokens, "s")
    pulled = await two.reader.pulled(lease_id)
    two.reader.check(list(pulled.slots), tokens, pulled.cached_tokens)
    assert pulled.cached_tokens == len(tokens)
    assert pulled.bytes == 11 * SLOT_BYTES
    figures = await two.reader.stats()
    assert figures.leased_slots == 11
    await two.reader.worker.run(release(lease_id))
    await all_free(two)


async def test_blocks_come_while_later_ones_are_computed(two: Pair) -> None:
    """Ten chunks: when the last one is sealed, all the others have arrived."""
    worker = two.source.worker
    lease_id = await follow(two, FORTY, "s")
    (granted,) = await worker.run(acquire(FORTY, "s", joiner="@reader"))
    two.source.write(list(granted.granted.slots), FORTY)
    for chunk in range(10):
        await worker.run(seal_part(granted.granted.lease_id, FORTY, 4 * chunk, 4))
        await arrived(two, 4 * chunk + 4)
    await worker.run(pb.AttachOperation(hand_off=pb.HandOffLease(lease_id=granted.granted.lease_id)))
    pulled = await two.reader.pulled(lease_id)
    two.reader.check(list(pulled.slots), FORTY, pulled.cached_tokens)
    assert pulled.cached_tokens == len(FORTY)


async def test_a_handoff_that_the_reader_gave_up_leaves_nothing_waiting(two: Pair) -> None:
    lease_id = await follow(two, FORTY, "s")
    await asyncio.sleep(0.1)
    await two.reader.worker.run(release(lease_id))
    await until(two.reader.address, lambda reply: not reply.leases)
    await two.source.compute(FORTY, "s", joiner="@reader", hand_off=True)
    assert not (await two.source.stats()).leases
    again = await follow(two, [*FORTY, 1], "s")
    assert (await two.reader.pulled(again, 3)).cached_tokens == 0


async def test_a_handoff_whose_slots_are_taken_in_the_same_breath_ends_the_following(two: Pair) -> None:
    """One message hands a sequence off and gives other slots up, which starts the reclaim that takes the handed-off."""
    worker = two.source.worker
    lease_id = await follow(two, FORTY, "s")
    left = acquire(FORTY, "s", joiner="@reader")
    left.acquire.arrival_s = 1.0
    young = acquire(list(range(5000, 5000 + 10 * BLOCK)), "young")
    young.acquire.arrival_s = 2.0
    granted = [reply.granted.lease_id for reply in await worker.run(left, young)]
    old = acquire(list(range(9000, 9000 + 30 * BLOCK)), "old")
    replies = await worker.run(
        old, pb.AttachOperation(hand_off=pb.HandOffLease(lease_id=granted[0])), release(granted[1])
    )
    assert replies[0].granted.lease_id
    assert (await two.reader.pulled(lease_id, 5)).cached_tokens == 0
    await worker.run(release(replies[0].granted.lease_id))
    await two.reader.worker.run(release(lease_id))
    await all_free(two)


async def test_a_sequence_that_is_over_elsewhere_is_not_waited_for(two: Pair) -> None:
    lease_id = await follow(two, FORTY, "never computed")
    await asyncio.sleep(0.1)
    await two.reader.worker.run(pb.AttachOperation(finish_pull=pb.FinishPull(lease_id=lease_id)))
    assert (await two.reader.pulled(lease_id, 5)).cached_tokens == 0


def seal_part(lease_id: int, tokens: list[int], first: int, count: int) -> pb.AttachOperation:
    keys = block_keys(NAMESPACE, tokens, BLOCK)
    parent = keys[first - 1] if first else b""
    part = join_keys(keys[first : first + count])
    return pb.AttachOperation(
        seal=pb.SealBlocks(lease_id=lease_id, first_block=first, block_keys=part, parent_key=parent)
    )
