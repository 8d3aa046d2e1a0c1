"""A kvstore whose slab lies on a device (NumPy's): handed out by handle, staged for planes, gone with the process."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest

from headway.core.keys import block_keys, join_keys
from headway.fleet.process import FleetError, ServiceProcess
from headway.slab.descriptor import fetch_handle
from headway.v1 import kvstore_pb2 as pb
from tests.kvstore.pulling import NAMESPACE, SLOT_BYTES, SLOTS, WIDE, acquire, content
from tests.kvstore.rig import BLOCK, Peer, attached, kvstore, running, stats

ROOT = str(Path(__file__).parents[2])
TOKENS = list(range(5 * BLOCK + 3))


def on_device(run_dir: Path, *flags: str) -> ServiceProcess:
    run_dir.mkdir(exist_ok=True)
    return kvstore(run_dir, SLOTS * SLOT_BYTES, "--device", "numpy:0", *flags)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(on_device(tmp_path)) as process:
        yield process


async def compute(peer: Peer, slab: np.ndarray, tokens: list[int]) -> int:
    """Acquire, write and seal; the lease."""
    (granted,) = await peer.run(acquire(tokens))
    for block, slot in enumerate(granted.granted.slots):
        slab[slot, :SLOT_BYTES] = content(tokens, block)
    keys = join_keys(block_keys(NAMESPACE, tokens, BLOCK))
    lease_id: int = granted.granted.lease_id
    await peer.run(pb.AttachOperation(seal=pb.SealBlocks(lease_id=lease_id, block_keys=keys)))
    return lease_id


async def test_the_slab_is_opened_by_its_handle_and_checksummed_on_its_device(store: ServiceProcess) -> None:
    async with attached(store.address, "w", kv_format=WIDE) as peer:
        assert (peer.welcome.total_slots, peer.welcome.device.bytes) == (SLOTS, SLOTS * SLOT_BYTES)
        await compute(peer, peer.map(), TOKENS)
        figures = await stats(store.address, checksum_blocks=True)
    assert len({checksum.checksum for checksum in figures.checksums}) == 5
    log = store.log.read_text()
    assert "event=device_slab device=numpy:0 name='host memory' slab_bytes=2097152 left_for_weights_bytes=" in log


async def test_a_secret_opens_the_slab_once(store: ServiceProcess) -> None:
    async with attached(store.address, "w", kv_format=WIDE) as peer:
        peer.map()
        with pytest.raises(OSError, match="gave no handle: the secret was wrong or used before"):
            fetch_handle(peer.welcome.socket_path, peer.welcome.secret)


@pytest.mark.parametrize("plane", ["socket", "grpc", "peer", pytest.param("nixl", marks=pytest.mark.nixl)])
async def test_blocks_of_one_device_reach_another(tmp_path: Path, plane: str) -> None:
    """By way of staging (a few buffers' worth), or by itself: what is sealed at one store is the same at the other."""
    tokens = list(range(60 * BLOCK))
    async with AsyncExitStack() as stack:
        processes = [
            on_device(tmp_path / name, "--node-id", name, "--planes", plane, "--checksum", "all") for name in "ab"
        ]
        for process in processes:
            stack.enter_context(running(process))
        source, reader = [await stack.enter_async_context(attached(p.address, kv_format=WIDE)) for p in processes]
        await compute(source, source.map(), tokens)
        slab = reader.map()
        pull = pb.PullBlocks(kvstore=processes[0].address, blocks=60)
        (granted,) = await reader.run(acquire([*tokens, 1], pull=pull))
        async with asyncio.timeout(20):
            while not any(push.HasField("pulled") for push in reader.pushes):
                assert not await reader.read()
        (pulled,) = [push.pulled for push in reader.pushes if push.HasField("pulled")]
        assert pulled.lease_id == granted.granted.lease_id
        assert (pulled.cached_tokens, pulled.bytes) == (len(tokens), 60 * SLOT_BYTES)
        for block, slot in enumerate(pulled.slots[:60]):
            assert (slab[slot, :SLOT_BYTES] == content(tokens, block)).all(), block
        assert (await stats(processes[1].address)).peers[0].plane == plane


async def test_nothing_is_left_for_a_restart(store: ServiceProcess) -> None:
    async with attached(store.address, "w", incarnation="one", kv_format=WIDE) as peer:
        await compute(peer, peer.map(), TOKENS)
        store.signal(signal.SIGKILL)
        store.wait_ended(time.monotonic() + 5)
    store.start()
    store.wait_listening(time.monotonic() + 30)
    figures = await stats(store.address)
    assert (figures.total_slots, figures.cached_slots, figures.quarantined_slots) == (0, 0, 0)
    async with attached(store.address, "w", incarnation="one", kv_format=WIDE) as peer:
        assert not peer.map().any()


WORKER = """
import asyncio, sys
from tests.kvstore.rig import attached
from tests.kvstore.test_device_store import WIDE
async def main():
    async with attached(sys.argv[1], "w", kv_format=WIDE) as peer:
        slab = peer.map()
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_memory_is_freed_only_once_workers_have_let_go(store: ServiceProcess) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, store.address], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": ROOT}
    )
    with worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
            store.signal(signal.SIGTERM)
            await asyncio.sleep(2.0)
            assert store.alive
            worker.kill()
            await asyncio.to_thread(store.wait_ended, time.monotonic() + 2)
            assert not store.alive
        finally:
            worker.kill()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--device", "numpy:9"], "there is no numpy:9: this process sees 2 such devices"),
        (["--device", "gpu"], "setting device is gpu; it must be cpu, or cuda:N"),
        (["--device", "numpy:0", "--slab-bytes", str(1 << 50)], "bytes free; make slab_bytes smaller"),
        (["--planes", "peer"], "setting planes names peer, which is for slabs on devices of one host"),
        (["--host-bytes", "99999"], "setting host_bytes is for slabs on a device; make slab_bytes larger instead"),
    ],
)
def test_what_cannot_be_had_is_refused_in_one_line(tmp_path: Path, flags: list[str], sentence: str) -> None:
    process = kvstore(tmp_path, 1 << 20, *flags)
    with pytest.raises(FleetError, match=sentence), running(process):
        pass
    assert len(process.log.read_text().strip().splitlines()) == 1
