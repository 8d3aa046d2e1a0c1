"""A loop over an engine that waits for the test, with a little store; and what a sink heard of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from headway.core.fit import Timing
from headway.core.keys import block_keys
from headway.core.order import Order
from headway.core.sampling import Sampling
from headway.core.sequence import Finish
from headway.core.sequence import Sequence as Running
from headway.core.step import StepLimits
from headway.core.timings import Timings
from headway.engine.contract import Chunk, Draw, Drawn
from headway.engine.simulated import SimulatedEngine, expected_tokens, simulated_card
from headway.v1 import common_pb2
from headway.worker.active import Active
from headway.worker.cores import Share
from headway.worker.drafting import Drafting
from headway.worker.loop import EngineLoop
from tests.worker.store import LittleStore


class Heard:
    """A sink that remembers."""

    router_id = "r"

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.indexes: list[int] = []
        self.lease_id = 0
        self.failure: common_pb2.Failure | None = None
        self.over = asyncio.Event()

    def drawn(self, active: Active, drawn: Drawn, output_index: int, finish: Finish | None) -> None:
        self.tokens.append(drawn.token_id)
        self.indexes.append(output_index)
        self.lease_id = active.lease_id
        if finish or active.joiner:
            self.over.set()

    def failed(self, active: Active, failure: common_pb2.Failure) -> None:
        self.failure = failure
        self.over.set()


class GatedEngine(SimulatedEngine):
    """Each forward waits until the test lets it go; may fail on one token."""

    def __init__(self) -> None:
        super().__init__(simulated_card())
        self.gate = threading.Semaphore(1 << 30)
        self.entered = threading.Semaphore(0)
        self.fails_on: int | None = None
        self.error: Exception = RuntimeError("cannot compute this")
        self.batches: list[list[int]] = []
        # Named in a forward, and not forgotten since.
        self.known: set[Hashable] = set()

    def forget(self, sequence: Hashable) -> None:
        self.known.discard(sequence)

    def forward(self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> list[Drawn | None]:
        self.entered.release()
        assert self.gate.acquire(timeout=10)
        if any(self.fails_on in chunk.tokens for chunk in chunks):
            raise self.error
        self.batches.append([len(chunk.tokens) for chunk in chunks])
        self.known |= {chunk.sequence for chunk in chunks if chunk.sequence is not None}
        return super().forward(chunks)


class LayeredEngine(GatedEngine):
    """Of three layers: a forward that takes guests waits before its second and its third one until the test lets it go
    on, and says so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.interruptible = True
        self.pauses = threading.Semaphore(0)
        self.paused = threading.Semaphore(0)

    def forward(self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> list[Drawn | None]:
        if between is not None:
            for _ in range(2):
                self.paused.release()
                assert self.pauses.acquire(timeout=10)
                between()
        return super().forward(chunks)


class Bench:
    """A loop with its engine and store. `folder`: of the kvstore."""

    def __init__(
        self,
        limits: StepLimits,
        *,
        engine: GatedEngine | None = None,
        share: Share | None = None,
        timing: Timing | None = None,
        drafting: Drafting | None = None,
        folder: Path = Path(),
        slots: int = 64,
    ) -> None:
        self.engine, self.store = engine or GatedEngine(), LittleStore(slots)
        self.loop = EngineLoop(
            self.engine,
            limits,
            Order(),
            Timings(share.threads if share else 1, timing),
            growth_tokens=16,
            acquire_timeout_s=1.0,
            share=share,
            drafting=drafting,
        )
        self.loop.leases.use(self.store)  # type: ignore[arg-type]
        self.task: asyncio.Task[None] | None = None
        self.loop.attached(replace(self.store.slab(), folder=folder))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Bench]:
        """With its loop; whatever was done: the engine keeps nothing of a sequence that is over."""
        task = self.task = asyncio.create_task(self.loop.run())
        try:
            yield self
        finally:
            self.engine.gate.release(1000)
            if isinstance(self.engine, LayeredEngine):
                self.engine.pauses.release(1000)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.loop.close()
        assert self.engine.known <= {active.sequence for active in self.loop.actives}


def sequence(prompt: Sequence[int], max_tokens: int = 40) -> Running:
    return Running(
        sequence_id="s" + str(prompt[0]),
        attempt=0,
        tokens=list(prompt),
        prompt_tokens=len(prompt),
        namespace=b"n",
        keys=block_keys(b"n", prompt, 16),
        sampling=Sampling(),
        max_tokens=max_tokens,
        stop_token_ids=frozenset(),
        arrival_s=0.0,
        block_size=16,
        context_tokens=4096,
        given=len(prompt),
    )


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return expected_tokens(prompt, count, lambda index: Draw(Sampling(), index))


async def until_over(heard: Heard) -> None:
    await asyncio.wait_for(heard.over.wait(), 10)
