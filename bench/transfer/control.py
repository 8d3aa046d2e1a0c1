"""How quick the control plane stays while blocks move at full rate: small acquires at both kvstores meanwhile."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from bench.report import mark, progress
from bench.transfer.contract import BLOCK_BYTES
from bench.transfer.process import Side
from bench.transfer.store_pair import StorePair

PULL_BLOCKS = 448
MARK_MS = 2.0


def control(slots: int, *, quick: bool) -> dict[str, Any]:
    """Figures by kvstore, and the mark. Raises MoverError."""
    progress("acquires while the socket plane moves blocks")
    seconds = 3.0 if quick else 15.0
    pair = StorePair(slots)
    with ExitStack() as stack:
        stack.callback(pair.close)
        pair.open()
        askers = {
            process.name: Side(sys.executable, "asker", {"role": process.name, "address": process.address}, [])
            for process in pair.processes
        }
        for asker in askers.values():
            stack.callback(asker.close)
            asker.answer()
        figures: dict[str, Any] = {"idle": _ask(askers, seconds)}
        with ThreadPoolExecutor(1) as pulling:
            moved = pulling.submit(pair.do, _pull(pair, time.monotonic() + seconds))
            figures["under_pull"] = _ask(askers, seconds)
            figures["pulled_gb_s"] = round(moved.result() / seconds / 1e9, 3)
    worst: float = max(row["p99_ms"] for row in figures["under_pull"].values())
    return {"figures": figures, "mark": mark(worst, MARK_MS, "ms", at_most=True)}


def _ask(askers: dict[str, Side], seconds: float) -> dict[str, Any]:
    with ThreadPoolExecutor(len(askers)) as threads:
        answers = threads.map(lambda asker: asker.ask(seconds=seconds), askers.values())
        return dict(zip(askers, answers, strict=True))


async def _pull(pair: StorePair, until_s: float) -> int:
    """Fetch one new sequence after the other; the bytes."""
    moved = 0
    while time.monotonic() < until_s:
        keys, _ = await pair.compute(PULL_BLOCKS)
        await pair.fetch(keys)
        moved += PULL_BLOCKS * BLOCK_BYTES
    return moved
