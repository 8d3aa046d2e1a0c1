"""How fast this worker is: measured before it takes work, and kept over restarts."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from headway.core.fit import ForwardWork, Timing
from headway.core.sampling import Sampling
from headway.core.timings import Timings
from headway.engine.contract import Chunk, Draw, Engine
from headway.slab.host import slot_stride

log = logging.getLogger(__name__)

# (new, cached) tokens of a prompt, shortest first, so that a slow engine measures at least those.
PROMPTS = [(32, 0), (128, 0), (512, 0), (128, 512), (1024, 0)]
# (sequences, tokens of context of each) of a decode step.
STEPS = [(1, 64), (1, 512), (4, 64), (4, 512), (8, 256)]
SLOTS_A_SEQUENCE = 1024
REPEATS = 2
SAVE_S = 60.0


def measure(engine: Engine, timing: Timing, seconds: float) -> None:
    """Time forwards in scratch memory for about `seconds`, at the most three forwards longer. Those of a size for which
    kernels are made, and those in which a sequence's copies are, are left out. `engine` is unbound afterwards.
    """
    until = time.monotonic() + seconds
    card = engine.card
    block = card.kv_format.block_size
    batch = max(sequences for sequences, _ in STEPS)
    table = np.arange(batch * (SLOTS_A_SEQUENCE // block + 1), dtype=np.int32).reshape(batch, -1)
    engine.bind(engine.scratch(table.size, slot_stride(card.kv_format.slot_bytes)))

    def prompt(sequence: int, new: int, cached: int) -> Chunk:
        return Chunk([1] * new, cached, table[sequence], Draw(Sampling(), 0))

    def step(sequence: int, context: int) -> Chunk:
        return Chunk([1], context, table[sequence], Draw(Sampling(), 1), sequence)

    work = [ForwardWork([lengths]) for lengths in PROMPTS if sum(lengths) < card.context_tokens]
    # In turns, so that both are known when the time is over soon.
    steps = [ForwardWork((), n, n * context) for n, context in STEPS if context + 2 < card.context_tokens]
    jobs = [job for pair in zip(work, steps, strict=False) for job in pair]
    for at_job, job in enumerate(jobs * REPEATS):
        if job.prompts:
            chunks = [prompt(at, *lengths) for at, lengths in enumerate(job.prompts)]
            if at_job < len(jobs):
                engine.forward(chunks)
        else:
            context = job.kv_tokens // job.batch
            for ahead in (0, 1):
                # A sequence's first step is not like the others: what the engine keeps beside the slab is made in it.
                engine.forward([step(at, context + ahead) for at in range(job.batch)])
            chunks = [step(at, context + 2) for at in range(job.batch)]
        started = time.monotonic()
        engine.forward(chunks)
        timing.observe(job, time.monotonic() - started)
        for at in range(job.batch):
            engine.forget(at)
        if time.monotonic() > until:
            break
    engine.unbind()
    timing.anchor()
    log.info("event=measured prefill=%s step=%s", timing.predictor.prefill, timing.predictor.step)


@contextlib.contextmanager
def alone(timeout_s: float = 20.0) -> Iterator[None]:
    """While no other worker of this user on this machine measures itself; or when that did not come to be in time."""
    until = time.monotonic() + timeout_s
    path = Path(tempfile.gettempdir()) / f"headway-measure-{os.getuid()}"
    with path.open("w") as file:
        while time.monotonic() < until:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.02)
        yield


class TimingFile:
    """The timings of a worker in a JSON file, for the model and the place that it was measured for; "": no file."""

    def __init__(self, path: str, identity: str) -> None:
        self._path = Path(path) if path else None
        self._identity = identity

    def load(self, timings: Timings) -> bool:
        """Whether the file had figures of this worker; a file that cannot be used is as good as none."""
        if self._path is None:
            return False
        try:
            kept = json.loads(self._path.read_text())
            if kept["identity"] != self._identity:
                return False
            if "timings" not in kept:
                raise ValueError("an earlier version wrote it; it is measured anew")
            timings.restore(kept["timings"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("event=timing_file_unusable path=%s reason=%s", self._path, error)
            return False
        return True

    async def keep(self, timings: Timings) -> None:
        """Save it every minute: a worker that is killed loses no more."""
        while self._path is not None:
            await asyncio.sleep(SAVE_S)
            await asyncio.to_thread(self.save, timings)

    def save(self, timings: Timings) -> None:
        """A file that cannot be written costs a measurement at the next start, nothing else."""
        if self._path is None or not timings.known:
            return
        text = json.dumps({"identity": self._identity, "timings": timings.state()})
        partial = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self._path)
        except OSError as error:
            log.warning("event=timing_file_not_written path=%s reason=%s", self._path, error)
            with contextlib.suppress(OSError):
                partial.unlink()
