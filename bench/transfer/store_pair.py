"""Two real kvstores with a worker attached to each: what Headway's planes are measured with."""

from __future__ import annotations

import asyncio
import random
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import uvloop

from bench.transfer.contract import BLOCK_BYTES, BLOCK_TOKENS, MoverError, process_cpu_s
from headway.core.keys import block_keys, join_keys
from headway.core.model import KvFormat, LayerGroup, ModelCard
from headway.fleet.process import FleetError, ServiceProcess
from headway.v1 import kvstore_pb2 as pb
from headway.worker.attach import Attachment, Slab

# SmolLM2-135M in float32: 30 layers, 3 KV heads of 64.
FORMAT = KvFormat(
    BLOCK_TOKENS, "float32", "layer,kv,token,head,dim", (LayerGroup(30, 3, 64, BLOCK_BYTES // BLOCK_TOKENS),)
)
CARD = ModelCard("bench", b"bench", 8192, 2, (), FORMAT)
ANSWER_S = 60.0
Result = TypeVar("Result")


class Worker:
    """A worker that computes nothing: it asks its kvstore for leases, as the engine loop does."""

    def __init__(self, address: str, name: str) -> None:
        self.slab: Slab | None = None
        self._attached = asyncio.Event()
        self._pulled: dict[int, asyncio.Future[pb.LeasePulled]] = {}
        self._attachment = Attachment(
            address,
            name,
            CARD,
            on_attached=self._on_attached,
            on_lost=self._on_lost,
            on_reclaim=lambda lease_id: None,
            on_offer=lambda granted: None,
            on_pulled=self._on_pulled,
        )
        self._running = asyncio.create_task(self._attachment.run())

    async def ready(self) -> Slab:
        async with asyncio.timeout(ANSWER_S):
            await self._attached.wait()
        assert self.slab is not None
        return self.slab

    async def run(self, operation: pb.AttachOperation) -> pb.AttachReply:
        """The reply. Raises MoverError when it is a failure, or none comes."""
        reply: asyncio.Future[pb.AttachReply] = asyncio.get_running_loop().create_future()
        self._attachment.submit(operation, reply.set_result)
        async with asyncio.timeout(ANSWER_S):
            answer = await reply
        if answer.HasField("failure"):
            raise MoverError(answer.failure.message)
        return answer

    async def acquire(self, keys: list[bytes], tokens: int, pull: pb.PullBlocks | None = None) -> pb.LeaseGranted:
        acquire = pb.AcquireLease(
            sequence_id=secrets.token_hex(4), block_keys=join_keys(keys), tokens=tokens, timeout_s=5.0, pull=pull
        )
        return (await self.run(pb.AttachOperation(acquire=acquire))).granted

    async def pulled(self, lease_id: int) -> pb.LeasePulled:
        """What is said at the end of a pull, whether that has been or comes."""
        async with asyncio.timeout(ANSWER_S):
            return await self._future(lease_id)

    async def release(self, lease_id: int) -> None:
        await self.run(pb.AttachOperation(release=pb.ReleaseLease(lease_id=lease_id)))

    async def seal(self, lease_id: int, keys: list[bytes]) -> None:
        await self.run(pb.AttachOperation(seal=pb.SealBlocks(lease_id=lease_id, block_keys=join_keys(keys))))

    async def stop(self) -> None:
        self._running.cancel()
        await asyncio.gather(self._running, return_exceptions=True)

    def _future(self, lease_id: int) -> asyncio.Future[pb.LeasePulled]:
        if lease_id not in self._pulled:
            self._pulled[lease_id] = asyncio.get_running_loop().create_future()
        return self._pulled[lease_id]

    def _on_attached(self, slab: Slab) -> None:
        self.slab = slab
        self._attached.set()

    async def _on_lost(self) -> None:
        self.slab = None

    def _on_pulled(self, pulled: pb.LeasePulled) -> None:
        self._future(pulled.lease_id).set_result(pulled)


def _fill(source: Slab, reader: Slab) -> None:
    """Random bytes at the source, none at the reader."""
    words = source.view.view(np.uint64)
    words[:] = np.random.default_rng(3).integers(0, 2**63, words.shape, np.uint64)
    reader.view[:] = 0


class StorePair:
    """Kvstores "source" and "reader" of `slots` slots each, handed out in random order. Its loop runs in a thread."""

    def __init__(self, slots: int, *flags: str) -> None:
        self.slots = slots
        self._flags = flags
        self._stack = ExitStack()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.processes: list[ServiceProcess] = []
        self.source: Worker
        self.reader: Worker

    def open(self) -> None:
        """Raises MoverError when a kvstore does not start."""
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="headway-bench-")))
        self._thread.start()
        try:
            for name in ("source", "reader"):
                self.processes.append(self._kvstore(folder, name))
            for process in self.processes:
                process.wait_listening(time.monotonic() + ANSWER_S)
        except FleetError as error:
            raise MoverError(str(error)) from None
        self.do(self._attach())

    def _kvstore(self, folder: Path, name: str) -> ServiceProcess:
        flags = ["--node-id", name, "--slab-bytes", str(self.slots * BLOCK_BYTES), "--run-dir", str(folder)]
        flags += ["--slab-name", f"headway-bench-{secrets.token_hex(4)}", *self._flags]
        process = ServiceProcess(name, "kvstore", flags, {}, folder, 0)
        process.start()
        return process

    async def _attach(self) -> None:
        self.source, self.reader = (Worker(process.address, f"bench-{process.name}") for process in self.processes)
        source, reader = await self.source.ready(), await self.reader.ready()
        # Not on the loop: a worker that says nothing for some seconds loses its leases.
        await asyncio.to_thread(_fill, source, reader)
        for worker in (self.source, self.reader):
            await self._shuffle(worker)

    async def _shuffle(self, worker: Worker) -> None:
        """Give all slots back in random order: from now on neighbours in a block table are none in the slab."""
        leases = [(await worker.acquire([], 1)).lease_id for _ in range(self.slots)]
        random.Random(5).shuffle(leases)
        for lease_id in leases:
            await worker.release(lease_id)

    def do(self, job: Coroutine[Any, Any, Result]) -> Result:
        """Run it on the pair's loop. Raises MoverError."""
        try:
            return asyncio.run_coroutine_threadsafe(job, self._loop).result(ANSWER_S * 2)
        except TimeoutError:
            raise MoverError("a kvstore did not answer in time") from None

    async def compute(self, blocks: int) -> tuple[list[bytes], list[int]]:
        """A new sequence of `blocks` blocks, sealed at the source; its keys and slots."""
        keys = block_keys(secrets.token_bytes(32), range(blocks * BLOCK_TOKENS), BLOCK_TOKENS)
        granted = await self.source.acquire(keys, blocks * BLOCK_TOKENS)
        await self.source.seal(granted.lease_id, keys)
        await self.source.release(granted.lease_id)
        return keys, list(granted.slots)

    async def fetch(self, keys: list[bytes]) -> tuple[float, list[int]]:
        """The reader gets these blocks: seconds from asking for a lease to hearing that all is there, and the slots."""
        pull = pb.PullBlocks(kvstore=self.processes[0].address, blocks=len(keys))
        tokens = len(keys) * BLOCK_TOKENS + 1
        started = time.perf_counter()
        granted = await self.reader.acquire(keys, tokens, pull)
        pulled = await self.reader.pulled(granted.lease_id)
        seconds = time.perf_counter() - started
        if pulled.bytes != len(keys) * BLOCK_BYTES:
            raise MoverError(f"{pulled.bytes} bytes came of {len(keys) * BLOCK_BYTES}")
        await self.reader.release(granted.lease_id)
        return seconds, list(pulled.slots)

    def cpu_s(self) -> list[float]:
        """CPU seconds so far of source and reader."""
        return [process_cpu_s(process.pid) for process in self.processes]

    def close(self) -> None:
        if self._thread.is_alive():
            for worker in ("source", "reader"):
                if hasattr(self, worker):
                    self.do(getattr(self, worker).stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()
        for process in self.processes:
            process.signal(signal.SIGTERM)
            process.wait_ended(time.monotonic() + 5)
        self._stack.close()
