"""Planned forwards in the engine's thread: run, timed, and when one fails, told apart."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from headway.core.fair import Fairness
from headway.core.fit import ForwardWork, Timing
from headway.core.sequence import Sequence
from headway.core.step import Work
from headway.engine.contract import Chunk, DeviceLost, Drawn, Engine

log = logging.getLogger(__name__)

Result = Drawn | None | Exception


class Forwards:
    """One at a time. What each took goes to the accounts of the tenants whose prompts it computed.

    `is_bound`: whether the engine has a slab; without one nothing may be computed. `prepare`: called first of all in
    the engine's thread.
    """

    def __init__(
        self,
        engine: Engine,
        fairness: Fairness,
        is_bound: Callable[[], bool],
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._fairness = fairness
        self._is_bound = is_bound
        self._threads: int | None = None
        self._thread = ThreadPoolExecutor(1, "engine", prepare)

    async def run(
        self, work: list[Work[Sequence]], chunks: list[Chunk], timing: Timing, threads: int | None = None
    ) -> list[Result]:
        """The result of each chunk: what was drawn, None where nothing was, or why it failed. What it took goes to
        `timing`. threads: to compute with; None leaves them.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._run, work, chunks, timing, threads)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(
        self, work: list[Work[Sequence]], chunks: list[Chunk], timing: Timing, threads: int | None
    ) -> list[Result]:
        """When the batch fails, each chunk runs alone, so that only the culprit fails."""
        if threads is not None and threads != self._threads:
            self._engine.use_threads(threads)
            self._threads = threads
        started = time.monotonic()
        try:
            results: list[Result] = list(self._engine.forward(chunks))
        except DeviceLost as error:
            return [error] * len(chunks)
        except Exception:
            log.exception("event=forward_failed sequences=%d", len(chunks))
            return [self._run_alone(chunk) for chunk in chunks]
        self._took(work, timing, time.monotonic() - started)
        return results

    def _run_alone(self, chunk: Chunk) -> Result:
        if not self._is_bound():
            return DeviceLost("the kvstore of this node went away")
        try:
            return self._engine.forward([chunk])[0]
        except Exception as error:
            return error

    def _took(self, work: list[Work[Sequence]], timing: Timing, seconds: float) -> None:
        prompts = [(item.count, item.start) for item in work if not item.sequence.decoding]
        decoding = [item.sequence for item in work if item.sequence.decoding]
        timing.observe(ForwardWork(prompts, len(decoding), sum(s.computed for s in decoding)), seconds)
        new = sum(count for count, _ in prompts)
        for item in work:
            if not item.sequence.decoding:
                self._fairness.charge(item.sequence.tenant, seconds * item.count / new)
