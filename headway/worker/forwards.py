"""Planned forwards in the engine's thread: run, timed, and when one fails, told apart; guests between their layers."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from headway.core.fit import ForwardWork, Timing
from headway.core.sequence import Sequence
from headway.core.step import Work
from headway.engine.contract import Chunk, DeviceLost, Drawn, Engine

log = logging.getLogger(__name__)

Result = Drawn | None | Exception


class Step(NamedTuple):
    """A planned forward: `chunks` of `work`, one each. threads: to compute with; None leaves them. What it takes goes
    to `timing`.
    """

    work: list[Work[Sequence]]
    chunks: list[Chunk]
    threads: int | None
    timing: Timing


class Done(NamedTuple):
    """Of each chunk what was drawn, None where nothing was, or why it failed. The forward began at `started_s`
    (time.monotonic) and took `seconds`, guests left out.
    """

    results: list[Result]
    started_s: float
    seconds: float


class Forwards:
    """One at a time, and between two layers of one with guests at most one other, which is done before it goes on.

    `is_bound`: whether the engine has a slab; without one nothing may be computed. `prepare`: called first of all in
    the engine's thread.
    """

    def __init__(
        self, engine: Engine, is_bound: Callable[[], bool], prepare: Callable[[], None] = lambda: None
    ) -> None:
        self._engine = engine
        self._is_bound = is_bound
        self._threads: int | None = None
        self._thread = ThreadPoolExecutor(1, "engine", prepare)
        # Left here by the event loop, taken away by either thread.
        self._invited: deque[Step] = deque()

    async def run(self, step: Step, on_guest: Callable[[Step, Done], None] | None = None) -> Done:
        """Compute it. on_guest: told on the event loop of each guest that was computed meanwhile, always before this
        returns; None: there are none.
        """
        loop = asyncio.get_running_loop()

        def tell(guest: Step, done: Done) -> None:
            assert on_guest is not None
            loop.call_soon_threadsafe(on_guest, guest, done)

        return await loop.run_in_executor(self._thread, self._run, step, None if on_guest is None else tell)

    def invite(self, guest: Step) -> None:
        """Compute it between the next two layers of the forward that runs."""
        self._invited.append(guest)

    def withdraw(self) -> Step | None:
        """The guest that was invited and has not begun; it will not."""
        return self._invited.popleft() if self._invited else None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _run(self, step: Step, tell: Callable[[Step, Done], None] | None) -> Done:
        if step.threads is not None and step.threads != self._threads:
            self._engine.use_threads(step.threads)
            self._threads = step.threads
        if tell is None:
            return self._compute(step)
        return self._compute(step, _Guests(self._next_guest, self._compute, tell))

    def _next_guest(self) -> Step | None:
        """None, too, where nothing may be computed any more."""
        return self.withdraw() if self._is_bound() else None

    def _compute(self, step: Step, guests: _Guests | None = None) -> Done:
        """When the batch fails, each chunk runs alone, so that only the culprit fails."""
        started_s = time.monotonic()
        failed = False
        try:
            results: list[Result] = list(self._engine.forward(step.chunks, guests))
        except DeviceLost as error:
            results, failed = [error] * len(step.chunks), True
        except Exception:
            log.exception("event=forward_failed sequences=%d", len(step.chunks))
            results, failed = [self._compute_alone(chunk) for chunk in step.chunks], True
        seconds = time.monotonic() - started_s - (guests.seconds if guests else 0.0)
        if not failed:
            _observe(step, seconds)
        return Done(results, started_s, seconds)

    def _compute_alone(self, chunk: Chunk) -> Result:
        if not self._is_bound():
            return DeviceLost("the kvstore of this node went away")
        try:
            return self._engine.forward([chunk])[0]
        except Exception as error:
            return error


@dataclass(slots=True)
class _Guests:
    """Called between two layers of a forward: computes who waits there. `seconds`: that this took of the forward's."""

    next: Callable[[], Step | None]
    compute: Callable[[Step], Done]
    tell: Callable[[Step, Done], None]
    seconds: float = 0.0

    def __call__(self) -> None:
        guest = self.next()
        if guest is None:
            return
        began_s = time.monotonic()
        self.tell(guest, self.compute(guest))
        self.seconds += time.monotonic() - began_s


def _observe(step: Step, seconds: float) -> None:
    prompts = [(item.count, item.start) for item in step.work if not item.sequence.decoding]
    decoding = [item.sequence for item in step.work if item.sequence.decoding]
    drafts = sum(chunk.drafts for chunk in step.chunks)
    step.timing.observe(ForwardWork(prompts, len(decoding), sum(s.computed for s in decoding), drafts), seconds)
