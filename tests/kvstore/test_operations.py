"""Operations against a real kvstore: each is answered, bad ones with a status and a sentence, and nothing leaks."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from headway.core.model import KvFormat, LayerGroup
from headway.fleet.process import ServiceProcess
from headway.runtime.channels import open_channel
from headway.runtime.convert import kv_format_to_proto
from headway.v1 import kvstore_pb2 as pb
from headway.v1 import kvstore_pb2_grpc
from tests.kvstore.rig import FORMAT, acquire, attached, kvstore, release, running, seal, slab_file, stats, until

A = list(range(40))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(kvstore(tmp_path)) as process:
        yield process


def altered(operation: pb.AttachOperation, **fields: object) -> pb.AttachOperation:
    for name, value in fields.items():
        setattr(operation.acquire, name, value)
    return operation


async def test_every_operation_is_answered_the_senseless_ones_with_a_sentence(store: ServiceProcess) -> None:
    senseless = [
        altered(acquire(A), tokens=0),
        altered(acquire(A), block_keys=b"short"),
        altered(acquire(A), arrival_s=float("nan")),
        altered(acquire(A), timeout_s=float("inf")),
        pb.AttachOperation(),
    ]
    fine = [pb.AttachOperation(renew=pb.RenewLeases()), pb.AttachOperation(cancel_acquire=pb.CancelAcquire())]
    async with attached(store.address) as peer:
        replies = await peer.run(*senseless, *fine)
        assert [reply.failure.code for reply in replies[:5]] == [grpc.StatusCode.INVALID_ARGUMENT.value[0]] * 5
        assert all(len(reply.failure.message) > 20 and not reply.failure.retryable for reply in replies[:5])
        assert [reply.WhichOneof("reply") for reply in replies[5:]] == ["done", "done"]
        (unknown,) = await peer.run(seal(99, A))
        assert unknown.failure.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert (await stats(store.address)).free_slots == 64


async def test_a_cancelled_acquire_is_answered(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        (granted,) = await peer.run(acquire([1] * 1000))
        cancel = pb.AttachOperation(cancel_acquire=pb.CancelAcquire(sequence_id="s"))
        waited, cancelled = await peer.run(acquire(A, arrival_s=1.0), cancel)
        assert waited.failure.code == grpc.StatusCode.CANCELLED.value[0]
        assert cancelled.HasField("done")
        await peer.run(release(granted.granted.lease_id))
        assert (await stats(store.address)).waiting_acquires == 0


async def test_waiting_for_slots_ends_in_time(store: ServiceProcess) -> None:
    async with attached(store.address) as peer:
        await peer.run(acquire([1] * 1000))
        (late,) = await peer.run(altered(acquire(A, arrival_s=1.0), timeout_s=0.2))
        assert late.failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert late.failure.retryable
        (never,) = await peer.run(acquire([1] * 1100))
        assert never.failure.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
        assert not never.failure.retryable
        assert "slab_bytes" in never.failure.message


async def test_a_joiner_needs_the_epoch_of_the_lease(store: ServiceProcess) -> None:
    async with attached(store.address, "p") as prefill, attached(store.address, "d") as decode:
        (granted,) = await prefill.run(acquire(A, joiner="d"))
        lease_id, epoch = granted.granted.lease_id, prefill.welcome.epoch
        join = [pb.AttachOperation(join=pb.JoinLease(lease_id=lease_id, epoch=at)) for at in (epoch - 1, epoch)]
        stale, joined = await decode.run(*join)
        assert stale.failure.code == grpc.StatusCode.NOT_FOUND.value[0]
        assert joined.granted == granted.granted


async def test_a_second_stream_of_the_same_incarnation_ends_the_first(store: ServiceProcess) -> None:
    async with attached(store.address, incarnation="one") as first:
        first.map()
        await first.run(acquire(A))
        async with attached(store.address, incarnation="one") as second:
            assert await first.call.read() == grpc.aio.EOF
            assert (await stats(store.address)).free_slots == 64
            (granted,) = await second.run(acquire(A))
            assert granted.granted.lease_id
            assert list((await stats(store.address)).workers) == ["w"]


@pytest.mark.parametrize(
    "senseless",
    [
        KvFormat(0, "float32", "layer,kv,head,token,dim", FORMAT.groups),
        KvFormat(16, "float32", "layer,kv,head,token,dim", ()),
        KvFormat(16, "float32", "layer,kv,head,token,dim", (LayerGroup(1, 1, 1, 0),)),
    ],
)
async def test_a_kv_format_of_no_bytes_is_refused(store: ServiceProcess, senseless: KvFormat) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with attached(store.address, kv_format=senseless):
            pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    async with attached(store.address):
        pass


async def test_a_hello_comes_first(store: ServiceProcess) -> None:
    async with open_channel(store.address) as channel:
        call: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel).Attach()
        await call.write(pb.AttachRequest(operations=pb.AttachOperations()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_silent_worker_is_cut_off_and_no_other(tmp_path: Path) -> None:
    with running(kvstore(tmp_path, 256 << 10, "--worker-silence-s", "0.8")) as process:
        async with attached(process.address) as peer, open_channel(process.address) as channel:
            await peer.run(acquire(A))
            silent: Any = kvstore_pb2_grpc.KvStoreServiceStub(channel).Attach()
            hello = pb.AttachHello(worker_id="v", kv_format=kv_format_to_proto(FORMAT), incarnation="silent")
            await silent.write(pb.AttachRequest(hello=hello))
            await silent.read()
            assert await asyncio.wait_for(silent.read(), 5) == grpc.aio.EOF
            await until(process.address, lambda s: list(s.workers) == ["w"])
            assert (await stats(process.address)).leased_slots == 3


async def test_what_a_killed_kvstore_left_is_gone_after_the_next_clean_stop(
    store: ServiceProcess, tmp_path: Path
) -> None:
    store.signal(signal.SIGKILL)
    store.wait_ended(time.monotonic() + 5)
    assert list(tmp_path.glob("*.sock"))
    store.start()
    store.wait_listening(time.monotonic() + 30)
    async with attached(store.address) as peer:
        peer.map()
    store.signal(signal.SIGTERM)
    store.wait_ended(time.monotonic() + 10)
    assert not list(tmp_path.glob("*.sock"))
    assert not list(slab_file(store).parent.glob(f"{slab_file(store).name}*"))
