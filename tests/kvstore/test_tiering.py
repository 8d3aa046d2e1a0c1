"""A real kvstore over a disk tier and a remote one: what the slab evicts comes back right, or is computed again."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from headway.core.keys import block_keys, split_keys
from headway.runtime.channels import open_channel
from headway.v1 import kvstore_pb2 as pb
from headway.v1 import kvstore_pb2_grpc
from tests.kvstore.pulling import BLOCK, NAMESPACE, SLOT_BYTES, SLOTS, WIDE, Side, acquire
from tests.kvstore.redis_rig import Server
from tests.kvstore.rig import attached, kvstore, release, running, rust_built, slab_file, until

# Half of the slab is written ahead.
QUARTER = SLOTS // 4
# Prompts of a quarter each: the first leave the slab.
FIRST_OUT = range(1, 8)
MEBIBYTE = 1 << 20


def prompt(name: int) -> list[int]:
    return [name] * (QUARTER * BLOCK)


@asynccontextmanager
async def store(tmp_path: Path, *flags: str) -> AsyncIterator[Side]:
    async with AsyncExitStack() as stack:
        tmp_path.mkdir(exist_ok=True)
        process = kvstore(tmp_path, SLOTS * SLOT_BYTES, *flags)
        stack.enter_context(running(process))
        worker = await stack.enter_async_context(attached(process.address, kv_format=WIDE))
        yield Side(process, worker, worker.map())


def disk(tmp_path: Path, size: int = 64 * MEBIBYTE) -> tuple[str, ...]:
    return ("--disk-dir", str(tmp_path), "--disk-bytes", str(size))


async def tiers_open(side: Side, count: int = 1) -> None:
    await until(side.address, lambda reply: len(reply.tiers) == count)


async def push_out(side: Side, *names: int) -> None:
    """Compute prompts one after the other, giving the write-back time in between; of five the first leaves the slab."""
    for name in names:
        await side.compute(prompt(name))
        await until(side.address, lambda reply: not reply.unwritten_blocks)


async def ask(side: Side, tokens: list[int], prefill_token_s: float = 1.0) -> pb.LeaseGranted:
    operation = acquire(tokens)
    operation.acquire.prefill_token_s = prefill_token_s
    (reply,) = await side.worker.run(operation)
    assert reply.HasField("granted"), reply
    return reply.granted


async def bring_up(side: Side, tokens: list[int]) -> pb.LeasePulled:
    """Ask for a prompt of which a tier has blocks, check what comes, and let go of it."""
    granted = await ask(side, tokens)
    assert granted.pulling
    pulled = await side.pulled(granted.lease_id)
    side.check(list(pulled.slots), tokens, pulled.cached_tokens)
    await side.worker.run(release(granted.lease_id))
    return pulled


async def tier(side: Side, name: str = "disk") -> pb.TierStats:
    return next(tier for tier in (await side.stats()).tiers if tier.name == name)


async def test_what_the_slab_evicted_comes_back_from_disk(tmp_path: Path) -> None:
    async with store(tmp_path, *disk(tmp_path)) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        pulled = await bring_up(side, [*prompt(1), 9])
        assert pulled.cached_tokens == len(prompt(1))
        figures = await tier(side)
        assert pulled.bytes == figures.bytes_read == figures.hits * SLOT_BYTES > 0
        assert (figures.torn, figures.errors) == (0, 0)
        assert figures.read_block_s > 0
        # The next one finds it in the slab.
        granted = await ask(side, [*prompt(1), 9])
        assert not granted.pulling
        assert granted.cached_tokens == len(prompt(1))


async def test_ten_that_want_the_same_read_it_once(tmp_path: Path) -> None:
    async with store(tmp_path, *disk(tmp_path)) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        ten = [[*prompt(1), 100 + at] for at in range(10)]
        granted = [await ask(side, tokens) for tokens in ten]
        for tokens, lease in zip(ten, granted, strict=True):
            slots, cached = list(lease.slots), lease.cached_tokens
            if lease.pulling:
                pulled = await side.pulled(lease.lease_id)
                slots, cached = list(pulled.slots), pulled.cached_tokens
            side.check(slots, tokens, cached)
            assert cached == len(prompt(1))
        assert (await tier(side)).hits <= QUARTER


async def test_reading_that_is_slower_than_computing_is_left(tmp_path: Path) -> None:
    async with store(tmp_path, *disk(tmp_path)) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        await bring_up(side, [*prompt(1), 9])
        await push_out(side, *range(11, 18))
        assert not (await ask(side, [*prompt(1), 9], prefill_token_s=1e-9)).pulling
        assert (await ask(side, [*prompt(1), 9], prefill_token_s=1.0)).pulling


async def test_a_request_that_ends_while_its_blocks_are_read_loses_no_slot(tmp_path: Path) -> None:
    async with store(tmp_path, *disk(tmp_path)) as side:
        await tiers_open(side)
        for round_ in range(10):
            await push_out(side, *range(10 * round_, 10 * round_ + 7))
            granted = await ask(side, [*prompt(10 * round_), 9])
            await side.worker.run(release(granted.lease_id))
            figures = await until(side.address, lambda reply: not reply.leases)
            assert figures.free_slots + figures.cached_slots == SLOTS


async def test_watchers_hear_of_a_block_until_no_tier_has_it(tmp_path: Path) -> None:
    """A file for 40 blocks: of 112 computed, at most 40 and those in the slab are still announced."""
    async with store(tmp_path, *disk(tmp_path, 40 * (SLOT_BYTES + 128) + 8192)) as side:
        await tiers_open(side)
        known: set[bytes] = set()
        watching = asyncio.create_task(watch(side.address, known))
        await push_out(side, *FIRST_OUT)
        async with asyncio.timeout(10):
            while True:
                figures = await side.stats()
                (disk_tier,) = figures.tiers
                if len(known) <= disk_tier.blocks + figures.cached_slots and disk_tier.evicted:
                    break
                await asyncio.sleep(0.05)
        assert set(block_keys(NAMESPACE, prompt(FIRST_OUT[-1]), BLOCK)) <= known
        assert len(known) > figures.cached_slots
        watching.cancel()


async def watch(address: str, known: set[bytes]) -> None:
    """Follow the store as a router does."""
    async with open_channel(address) as channel:
        call = kvstore_pb2_grpc.KvStoreServiceStub(channel).WatchBlocks(pb.WatchBlocksRequest())
        async for message in call:
            known.update(split_keys(message.stored.block_keys))
            known.difference_update(split_keys(message.removed.block_keys))


async def test_the_disk_outlives_a_store_that_lost_its_slab(tmp_path: Path) -> None:
    async with store(tmp_path / "first", *disk(tmp_path)) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        kept = (await tier(side)).blocks
        assert kept > QUARTER
        side.process.signal(signal.SIGKILL)
        side.process.wait_ended(time.monotonic() + 5)
        slab_file(side.process).unlink()
    async with store(tmp_path / "second", *disk(tmp_path)) as side:
        await tiers_open(side)
        assert (await tier(side)).blocks >= kept
        pulled = await bring_up(side, [*prompt(1), 9])
        assert pulled.cached_tokens == len(prompt(1))


async def test_a_torn_block_is_computed_again(tmp_path: Path) -> None:
    async with store(tmp_path, *disk(tmp_path)) as side:
        await tiers_open(side)
        await push_out(side, *FIRST_OUT)
        with (tmp_path / "headway-node-0.blocks").open("r+b") as file:
            size = file.seek(0, 2)
            for at in range(size // 2 - size // 2 % 512, size // 2 - size // 2 % 512 + 512 * 4096, 4096):
                file.seek(at)
                file.write(b"torn")
            for at in range(3 * SLOT_BYTES, 200 * SLOT_BYTES, SLOT_BYTES):
                if at < size - 8:
                    file.seek(at + 5)
                    file.write(b"torn")
        pulled = await bring_up(side, [*prompt(1), 9])
        assert pulled.cached_tokens < len(prompt(1))
        assert (await tier(side)).torn > 0


async def test_a_disk_that_cannot_be_had_is_one_line_and_no_tier(tmp_path: Path) -> None:
    nowhere = ("--disk-dir", "/proc/nowhere", "--disk-bytes", str(MEBIBYTE))
    async with store(tmp_path, *nowhere) as side:
        await push_out_without_tier(side)
        assert not (await side.stats()).tiers
        log = (tmp_path / "kvstore.log").read_text()
        assert log.count("event=tier_off") == 1


async def test_a_disk_that_cannot_be_had_does_not_cost_the_tier_below_it(tmp_path: Path, server: Server) -> None:
    nowhere = ("--disk-dir", "/proc/nowhere", "--disk-bytes", str(MEBIBYTE))
    async with store(tmp_path, *nowhere, "--remote-url", server.url) as side:
        figures = await until(side.address, lambda reply: reply.tiers)
        assert [tier.name for tier in figures.tiers] == ["remote"]


async def push_out_without_tier(side: Side) -> None:
    for name in (1, 2, 3):
        await side.compute(prompt(name))


async def test_what_one_node_evicted_another_one_takes_from_the_server(tmp_path: Path, server: Server) -> None:
    remote = ("--remote-url", server.url)
    async with store(tmp_path / "one", *remote) as one, store(tmp_path / "two", *remote) as two:
        for side in (one, two):
            await until(side.address, lambda reply: len(reply.tiers) == 1)
        await asyncio.sleep(0.2)
        await push_out(one, *FIRST_OUT)
        pulled = await bring_up(two, [*prompt(1), 9])
        assert rust_built(two.process.pid) == []
        assert pulled.cached_tokens == len(prompt(1))
        assert pulled.bytes == len(prompt(1)) // BLOCK * SLOT_BYTES


async def test_a_server_that_hangs_costs_one_time_limit_and_no_answer(tmp_path: Path, server: Server) -> None:
    async with store(tmp_path, "--remote-url", server.url) as side:
        await tiers_open(side)
        await asyncio.sleep(0.2)
        await push_out(side, *FIRST_OUT)
        server.process.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            granted = await ask(side, [*prompt(1), 9])
            if granted.pulling:
                await side.pulled(granted.lease_id)
            assert time.monotonic() - started < 2.0
            await side.worker.run(release(granted.lease_id))
            # From now on nobody waits for it.
            granted = await ask(side, [*prompt(2), 9])
            assert not granted.pulling
            await side.worker.run(release(granted.lease_id))
            await side.compute(prompt(50))
        finally:
            server.process.send_signal(signal.SIGCONT)
