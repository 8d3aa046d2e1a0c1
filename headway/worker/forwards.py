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
    """One at a time. What each took goes to `timing`, and to the accounts of the tenants whose prompts it computed.

    `is_bound`: whether the engine has a slab; without one nothing may be computed.
    """

    def __init__(self, engine: Engine, timing: Timing, fairness: Fairness, is_bound: Callable[[], bool]) -> None:
        self._engine = engine
        self._timing = timing
        self._fairness = fairness
        self._is_bound = is_bound
        self._thread = ThreadPoolExecutor(1, "engine")

    async def run(self, work: list[Work[Sequence]], chunks: list[Chunk]) -> list[Result]:
        """The result of each chunk: what was drawn, None where nothing was, or why it failed."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, work, chunks)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, work: list[Work[Sequence]], chunks: list[Chunk]) -> list[Result]:
        """When the batch fails, each chunk runs alone, so that only the culprit fails."""
        started = time.monotonic()
        try:
            results: list[Result] = list(self._engine.forward(chunks))
        except DeviceLost as error:
            return [error] * len(chunks)
        except Exception:
            log.exception("event=forward_failed sequences=%d", len(chunks))
            return [self._run_alone(chunk) for chunk in chunks]
        self._took(work, time.monotonic() - started)
        return results

    def _run_alone(self, chunk: Chunk) -> Result:
        if not self._is_bound():
            return DeviceLost("the kvstore of this node went away")
        try:
            return self._engine.forward([chunk])[0]
        except Exception as error:
            return error

    def _took(self, work: list[Work[Sequence]], seconds: float) -> None:
        prompts = [(item.count, item.start) for item in work if not item.sequence.decoding]
        decoding = [item.sequence for item in work if item.sequence.decoding]
        self._timing.observe(ForwardWork(prompts, len(decoding), sum(s.computed for s in decoding)), seconds)
        new = sum(count for count, _ in prompts)
        for item in work:
            if not item.sequence.decoding:
                self._fairness.charge(item.sequence.tenant, seconds * item.count / new)
