"""A real kvstore process: attach, share, quarantine, watch, restart, refuse; and no Rust in it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from headway.core.keys import block_keys, join_keys, split_keys
from headway.core.model import KvFormat, LayerGroup
from headway.fleet.process import FleetError, ServiceProcess
from headway.runtime.channels import open_channel
from headway.slab.descriptor import fetch_descriptor
from headway.v1 import kvstore_pb2 as pb
from headway.v1 import kvstore_pb2_grpc
from tests.kvstore.rig import acquire, attached, kvstore, release, running, rust_built, seal, slab_file, stats, until

A = list(range(40))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(kvstore(tmp_path)) as process:
        yield process


async def test_what_one_worker_writes_another_reads(store: ServiceProcess) -> None:
    async with attached(store.address, "a") as a, attached(store.address, "b") as b:
        mine, theirs = a.map(), b.map()
        (granted,) = await a.run(acquire(A))
        mine[granted.granted.slots[0], :4] = [1, 2, 3, 4]
        await a.run(seal(granted.granted.lease_id, A))
        (found,) = await b.run(acquire(A))
        assert found.granted.cached_tokens == 32
        assert list(theirs[found.granted.slots[0], :4]) == [1, 2, 3, 4]
        assert found.granted.slots[2] != granted.granted.slots[2]


async def test_one_message_of_operations_gets_one_message_of_replies(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        replies = await peer.run(*(acquire([seed] * 20) for seed in range(8)))
        assert [reply.WhichOneof("reply") for reply in replies] == ["granted"] * 8
        assert peer.messages == 1
        leases = [reply.granted.lease_id for reply in replies]
        await peer.run(*(release(lease_id) for lease_id in leases))
        assert peer.messages == 2


async def test_the_secret_is_of_use_once(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        peer.map()
        for secret in (peer.welcome.secret, b"x" * 32):
            with pytest.raises(OSError, match="secret"):
                fetch_descriptor(peer.welcome.socket_path, secret)


async def test_another_kv_format_is_refused_by_name(store: ServiceProcess) -> None:
    other = KvFormat(32, "float32", "layer,kv,head,token,dim", (LayerGroup(2, 1, 8, 128),))
    async with attached(store.address):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async with attached(store.address, kv_format=other):
                pass
    assert caught.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert "uint64" in (caught.value.details() or "")
    assert "float32" in (caught.value.details() or "")


async def test_a_broken_stream_quarantines_until_the_same_worker_attaches_again(store: ServiceProcess) -> None:
    async with attached(store.address, incarnation="one") as peer:
        peer.map()
        await peer.run(acquire(A))
    held = await until(store.address, lambda s: s.quarantined_slots == 3)
    assert held.free_slots == 61
    async with attached(store.address, incarnation="two"):
        assert (await stats(store.address)).quarantined_slots == 3
    async with attached(store.address, incarnation="one"):
        assert (await stats(store.address)).free_slots == 64


async def test_a_dead_worker_frees_what_it_held(store: ServiceProcess) -> None:
    code = f"""
import asyncio, sys
from tests.kvstore.rig import acquire, attached
async def main():
    async with attached({store.address!r}) as peer:
        peer.map()
        await peer.run(acquire(list(range(40))))
        print("held", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == "held\n"
        assert (await stats(store.address)).leased_slots == 3
        worker.send_signal(signal.SIGSTOP)
        await until(store.address, lambda s: s.quarantined_slots == 3, 15)
        worker.kill()
        await until(store.address, lambda s: s.free_slots == 64)
    finally:
        worker.kill()
        worker.communicate()


async def test_a_worker_that_gives_signs_of_life_is_left_alone(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        peer.map()
        await peer.run(acquire(A))
        await asyncio.sleep(4)
        assert (await stats(store.address)).leased_slots == 3


async def test_a_lease_passes_to_its_attached_joiner(store: ServiceProcess) -> None:
    async with attached(store.address, "prefill") as prefill, attached(store.address, "decode") as decode:
        decode.map()
        (granted,) = await prefill.run(acquire(A, joiner="decode"))
        lease_id = granted.granted.lease_id
        await prefill.run(pb.AttachOperation(hand_off=pb.HandOffLease(lease_id=lease_id)))
        while not decode.pushes:
            await decode.read()
        (push,) = decode.pushes
        assert (push.granted.lease_id, push.granted.sequence_id) == (lease_id, "s")
        assert list(push.granted.slots) == list(granted.granted.slots)
        await decode.run(release(lease_id))
        assert (await stats(store.address)).free_slots == 64


async def test_the_youngest_is_asked_to_give_way(store: ServiceProcess) -> None:
    async with attached(store.address, "old") as old, attached(store.address, "young") as young:
        (granted,) = await young.run(acquire([1] * 900, arrival_s=9.0))
        waiting = asyncio.create_task(old.run(acquire([2] * 300, arrival_s=1.0)))
        while not young.pushes:
            await young.read()
        assert young.pushes[0].reclaim.lease_id == granted.granted.lease_id
        await young.run(release(granted.granted.lease_id))
        (served,) = await waiting
        assert len(served.granted.slots) == 19


async def watch(address: str, epoch: int = 0, after: int = 0, messages: int = 1) -> list[pb.WatchBlocksResponse]:
    request = pb.WatchBlocksRequest(epoch=epoch, after_sequence_number=after)
    async with open_channel(address) as channel, asyncio.timeout(10):
        call = kvstore_pb2_grpc.KvStoreServiceStub(channel).WatchBlocks(request)
        out = [await call.read() for _ in range(messages)]
        call.cancel()
        return out


async def test_watchers_get_a_snapshot_then_events_and_resume_without_a_gap(store: ServiceProcess) -> None:
    keys = block_keys(b"n", A, 16)
    async with attached(store.address) as peer:
        (granted,) = await peer.run(acquire(A))
        await peer.run(seal(granted.granted.lease_id, A), release(granted.granted.lease_id))
        begin, stored, end = await watch(store.address, messages=3)
        assert (begin.WhichOneof("event"), end.WhichOneof("event")) == ("snapshot_begin", "snapshot_end")
        assert split_keys(stored.stored.block_keys) == keys
        (resumed,) = await watch(store.address, begin.epoch, 0)
        assert (resumed.first_sequence_number, resumed.sequence_number) == (1, 1)
        assert resumed.stored.block_keys == join_keys(keys)
        live = asyncio.create_task(watch(store.address, begin.epoch, 1))
        await asyncio.sleep(0.1)
        assert not live.done()
        await peer.run(acquire([9] * 64 * 16))
        (removed,) = await live
        assert split_keys(removed.removed.block_keys) == keys[::-1]
        (other_epoch,) = await watch(store.address, begin.epoch + 1, 1)
        assert other_epoch.WhichOneof("event") == "snapshot_begin"


async def test_a_clean_stop_leaves_nothing(store: ServiceProcess, tmp_path: Path) -> None:
    assert slab_file(store).exists()
    assert list(tmp_path.glob("*.sock"))
    store.signal(signal.SIGTERM)
    store.wait_ended(time.monotonic() + 10)
    assert not slab_file(store).exists()
    assert not list(tmp_path.glob("*.sock"))


def test_a_slab_that_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    process = kvstore(tmp_path, 1 << 50)
    process.start()
    with pytest.raises(FleetError, match="ended with status 1"):
        process.wait_listening(time.monotonic() + 30)
    lines = process.log.read_text().splitlines()
    assert len(lines) == 1
    assert "slab_bytes" in lines[0]
    assert not slab_file(process).exists()


async def test_checksums_change_only_with_the_bytes(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        slab = peer.map()
        (granted,) = await peer.run(acquire(A))
        await peer.run(seal(granted.granted.lease_id, A))
        before = (await stats(store.address, checksum_blocks=True)).checksums
        assert [c.block_key for c in before] == block_keys(b"n", A, 16)
        assert (await stats(store.address, checksum_blocks=True)).checksums == before
        slab[granted.granted.slots[1], 5] ^= 1
        after = (await stats(store.address, checksum_blocks=True)).checksums
        assert [a == b for a, b in zip(before, after, strict=True)] == [True, False]


async def test_a_serving_kvstore_has_nothing_built_in_rust(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        peer.map()
        (granted,) = await peer.run(acquire(A))
        await peer.run(seal(granted.granted.lease_id, A), release(granted.granted.lease_id))
        await peer.run(acquire([9] * 64 * 16))
        assert (await stats(store.address, checksum_blocks=True)).evicted_blocks == 2
        assert rust_built(store.pid) == []
        maps = Path(f"/proc/{store.pid}/maps").read_text()
        assert "numpy" in maps
        assert not [name for name in ("torch", "tokenizers", "safetensors", "transformers") if f"/{name}/" in maps]


def test_the_scan_for_rust_finds_it_where_it_is() -> None:
    code = "import tokenizers, sys; print('ready', flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert any("tokenizers" in file for file in rust_built(process.pid))
    finally:
        process.communicate("")
