"""kill -9 of a real kvstore: what was sealed is served again, what a live worker may write is not given out."""

from __future__ import annotations

import asyncio
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from headway.core.keys import block_keys
from headway.core.model import KvFormat, LayerGroup
from headway.fleet.process import FleetError, ServiceProcess
from headway.slab.host import SHM
from services.kvstore.restart import FormerWorker, Keeper, started_at
from tests.kvstore.rig import BLOCK, FORMAT, Peer, acquire, attached, kvstore, release, running, seal, slab_file, stats

SLOTS = 64
A, B = list(range(40)), list(range(100, 180))
KILLS = 100


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(kvstore(tmp_path)) as process:
        yield process


def kill(store: ServiceProcess) -> None:
    store.signal(signal.SIGKILL)
    store.wait_ended(time.monotonic() + 5)


def start(store: ServiceProcess) -> None:
    store.start()
    store.wait_listening(time.monotonic() + 30)


def content(tokens: list[int], block: int) -> bytes:
    return block_keys(b"content", tokens, BLOCK)[block] * 8


async def compute(peer: Peer, view: np.ndarray, tokens: list[int], sealed: int) -> int:
    """Acquire, write all full blocks, seal the first `sealed` of them; the lease."""
    (granted,) = await peer.run(acquire(tokens))
    lease = granted.granted
    for block in range(len(tokens) // BLOCK):
        view[lease.slots[block], :128] = np.frombuffer(content(tokens, block), np.uint8)
    if sealed:
        await peer.run(seal(lease.lease_id, tokens[: sealed * BLOCK]))
    return int(lease.lease_id)


async def found(peer: Peer, view: np.ndarray, tokens: list[int]) -> int:
    """How many blocks of it are served, each with the bytes that were sealed."""
    (granted,) = await peer.run(acquire([*tokens, 1]))
    blocks: int = granted.granted.cached_tokens // BLOCK
    for block in range(blocks):
        assert bytes(view[granted.granted.slots[block], :128]) == content(tokens, block)
    await peer.run(release(granted.granted.lease_id))
    return blocks


async def test_sealed_blocks_are_served_again(store: ServiceProcess) -> None:
    async with attached(store.address, incarnation="one") as peer:
        view = peer.map()
        await compute(peer, view, B, 5)
        await compute(peer, view, A, 1)
        epoch = peer.welcome.epoch
        kill(store)
    inode = slab_file(store).stat().st_ino
    start(store)
    assert slab_file(store).stat().st_ino == inode
    assert "event=restored blocks=6" in store.log.read_text()
    async with attached(store.address, incarnation="one") as peer:
        assert peer.welcome.epoch != epoch
        view = peer.map()
        assert await found(peer, view, B) == 5
        # The second block of A was written, but not sealed.
        assert await found(peer, view, A) == 1
    figures = await stats(store.address)
    assert (figures.cached_slots, figures.quarantined_slots) == (6, 0)


async def test_what_a_live_worker_may_write_is_quarantined_until_it_attaches(store: ServiceProcess) -> None:
    async with attached(store.address, incarnation="one") as peer:
        await compute(peer, peer.map(), B, 3)
        kill(store)
    start(store)
    figures = await stats(store.address)
    assert (figures.cached_slots, figures.quarantined_slots, figures.free_slots) == (3, 2, SLOTS - 5)
    async with attached(store.address, incarnation="two"):
        assert (await stats(store.address)).quarantined_slots == 2
        async with attached(store.address, incarnation="one"):
            figures = await stats(store.address)
    assert (figures.cached_slots, figures.quarantined_slots, figures.free_slots) == (3, 0, SLOTS - 3)


WORKER = """
import asyncio, sys
from tests.kvstore.rig import acquire, attached
async def main():
    async with attached(sys.argv[1], "mortal") as peer:
        peer.map()
        await peer.run(acquire(list(range(100))))
        print("ready", flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_what_a_dead_worker_had_is_free(store: ServiceProcess) -> None:
    root = str(Path(__file__).parents[2])
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, store.address], stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root}
    )
    try:
        assert worker.stdout is not None
        assert await asyncio.to_thread(worker.stdout.readline) == b"ready\n"
        kill(store)
        start(store)
        assert (await stats(store.address)).quarantined_slots == 7
        worker.kill()
        async with asyncio.timeout(10):
            while (await stats(store.address)).free_slots < SLOTS:
                await asyncio.sleep(0.02)
        kill(store)
        start(store)
        assert (await stats(store.address)).quarantined_slots == 0
    finally:
        worker.kill()
        worker.wait()
        if worker.stdout is not None:
            worker.stdout.close()


@asynccontextmanager
async def killed_with_blocks(store: ServiceProcess) -> AsyncIterator[None]:
    async with attached(store.address, incarnation="one") as peer:
        await compute(peer, peer.map(), B, 5)
        kill(store)
    yield
    start(store)
    async with attached(store.address, incarnation="one") as peer:
        view = peer.map()
        assert await found(peer, view, B) == 0
        await compute(peer, view, B, 5)


def test_a_kvstore_killed_while_it_starts_again_forgets_nobody() -> None:
    """Former workers stay noted until they are known to be dead."""
    name = f"headway-test-{uuid.uuid4().hex[:8]}"
    workers = [FormerWorker(f"incarnation-{at}", f"w{at}", os.getpid(), started_at(os.getpid())) for at in range(3)]
    keeper = Keeper(name, 64 << 10)
    keeper.lay_out(FORMAT)
    keeper.keep(workers[0])
    keeper.keep(workers[1])
    killed(keeper)
    second = Keeper(name, 64 << 10)
    assert second.former_workers() == workers[:2]
    second.keep(workers[2])
    killed(second)
    third = Keeper(name, 64 << 10)
    assert third.former_workers() == workers
    third.forget(workers[0].incarnation)
    killed(third)
    last = Keeper(name, 64 << 10)
    assert last.former_workers() == workers[1:]
    last.remove()


def killed(keeper: Keeper) -> None:
    """As the kernel ends it: its lock is gone, and no file."""
    os.close(keeper.segment.descriptor)
    fcntl.flock(keeper._metadata._descriptor, fcntl.LOCK_UN)
    os.close(keeper._metadata._descriptor)


async def test_another_size_starts_anew(store: ServiceProcess) -> None:
    async with killed_with_blocks(store):
        store._flags[store._flags.index("--slab-bytes") + 1] = str(128 << 10)


async def test_torn_notes_start_anew(store: ServiceProcess) -> None:
    async with killed_with_blocks(store):
        meta = SHM / f"{slab_file(store).name}.meta"
        meta.write_bytes(bytes(meta.stat().st_size))


async def test_another_slab_file_starts_anew(store: ServiceProcess) -> None:
    async with killed_with_blocks(store):
        size = slab_file(store).stat().st_size
        slab_file(store).rename(slab_file(store).with_suffix(".old"))
        slab_file(store).write_bytes(bytes(size))


async def test_another_model_starts_anew_once_the_former_workers_are_gone(store: ServiceProcess) -> None:
    other = KvFormat(BLOCK, "uint64", "token", (LayerGroup(1, 2, 1, 16),))
    async with attached(store.address, incarnation="one") as peer:
        await compute(peer, peer.map(), B, 5)
        kill(store)
    start(store)
    async with attached(store.address, incarnation="one"):
        pass
    async with asyncio.timeout(10):
        while (await stats(store.address)).workers:
            await asyncio.sleep(0.02)
    kill(store)
    # No former worker is left that may write.
    start(store)
    assert (await stats(store.address)).cached_slots == 5
    epoch = (await stats(store.address)).epoch
    async with attached(store.address, "other", kv_format=other):
        figures = await stats(store.address)
        assert figures.cached_slots == 0
        assert figures.epoch != epoch


async def test_two_stores_cannot_share_a_slab(store: ServiceProcess, tmp_path: Path) -> None:
    second = ServiceProcess("second", "kvstore", store._flags, {}, tmp_path, 0)
    second.start()
    with pytest.raises(FleetError, match="another kvstore uses the slab"):
        second.wait_listening(time.monotonic() + 30)
    assert slab_file(store).exists()


async def busy(peer: Peer, view: np.ndarray, draw: random.Random, prompts: list[list[int]]) -> None:
    """Sequences come and go, until the store is killed."""
    leases: list[int] = []
    while True:
        leases.append(await compute(peer, view, draw.choice(prompts), draw.randint(0, 3)))
        while len(leases) > draw.randint(0, 4):
            await peer.run(release(leases.pop(draw.randrange(len(leases)))))


@pytest.mark.timeout(300)
async def test_random_kills_serve_nothing_wrong_and_lose_no_slot(store: ServiceProcess) -> None:
    """A worker writes, seals and releases; the store is killed at a random moment, again and again."""
    draw = random.Random(11)
    prompts = [[seed] * length for seed in range(6) for length in (48, 70)] + [[1] * 32 + [2] * 32]
    kept = 0
    for _ in range(KILLS):
        async with attached(store.address, incarnation="one") as peer:
            view = peer.map()
            figures = await stats(store.address)
            assert figures.quarantined_slots == 0
            assert figures.free_slots + figures.cached_slots == SLOTS
            kept += figures.cached_slots
            for prompt in prompts:
                await found(peer, view, prompt)
            working = asyncio.create_task(busy(peer, view, draw, prompts))
            await asyncio.sleep(draw.random() * 0.03)
            kill(store)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
        start(store)
    assert kept > KILLS
