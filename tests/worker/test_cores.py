"""Cores of a node: what one worker keeps others do not use, and gets free when it is idle, or dies."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from headway.core.fit import Timing
from headway.core.step import StepLimits
from headway.engine.contract import Chunk, Drawn
from headway.worker.cores import KEPT, NICE, USED, Cores, Share
from tests.worker.rig import Bench, GatedEngine, Heard, sequence, until_over

OTHER = """
import sys
from pathlib import Path
from headway.worker.cores import Cores
cores = Cores()
cores.ids = [0, 1, 2, 3]
cores.open(Path(sys.argv[1]))
cores.hold(int(sys.argv[2]), int(sys.argv[3]))
print("held", flush=True)
sys.stdin.readline()
cores.hold(int(sys.argv[2]), 0)
print("let go", flush=True)
sys.stdin.readline()
"""


class Other:
    """Another worker's process, which holds some cores."""

    def __init__(self, folder: Path, kind: int, count: int) -> None:
        command = [sys.executable, "-c", OTHER, str(folder), str(kind), str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def let_go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self._heard()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _heard(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()


@contextmanager
def other(folder: Path, kind: int, count: int) -> Iterator[Other]:
    made = Other(folder, kind, count)
    try:
        yield made
    finally:
        made.kill()


def four(folder: Path) -> Cores:
    cores = Cores()
    cores.ids = [0, 1, 2, 3]
    cores.open(folder)
    return cores


@pytest.mark.parametrize("kind", [KEPT, USED])
def test_what_others_hold_is_seen_until_they_let_go(kind: int, tmp_path: Path) -> None:
    mine = four(tmp_path)
    assert mine.held_by_others(kind) == 0
    with other(tmp_path, kind, 1), other(tmp_path, kind, 2) as second:
        assert mine.held_by_others(kind) == 3
        assert mine.held_by_others(1 - kind) == 0
        second.let_go()
        assert mine.held_by_others(kind) == 1


def test_what_a_killed_process_held_is_free(tmp_path: Path) -> None:
    mine = four(tmp_path)
    with other(tmp_path, KEPT, 3) as held:
        held.kill()
        assert mine.held_by_others(KEPT) == 0


def test_no_more_can_be_held_than_there_is(tmp_path: Path) -> None:
    mine = four(tmp_path)
    with other(tmp_path, KEPT, 3) as held:
        mine.hold(KEPT, 3)
        held.let_go()
        with other(tmp_path, KEPT, 4):
            # One was left for me, three came free for the last one.
            mine.hold(KEPT, 0)
            assert mine.held_by_others(KEPT) == 3


def test_who_yields_computes_with_what_others_do_not_keep_and_at_least_one(tmp_path: Path) -> None:
    share = Share(four(tmp_path), threads=3, keep=0)
    assert share.begin() == 3
    with other(tmp_path, KEPT, 2):
        assert share.begin() == 2
        with other(tmp_path, KEPT, 2):
            assert share.begin() == 1
    assert share.begin() == 3


def test_who_keeps_cores_uses_those_of_others_while_they_are_idle(tmp_path: Path) -> None:
    share = Share(four(tmp_path), threads=4, keep=2)
    assert share.begin() == 4
    with other(tmp_path, USED, 1) as prompts:
        assert share.begin() == 3
        with other(tmp_path, KEPT, 2), other(tmp_path, USED, 2):
            assert share.begin() == 2
        prompts.let_go()
        assert share.begin() == 4


def test_what_is_kept_and_used_is_told_to_others_and_let_go_when_idle(tmp_path: Path) -> None:
    watcher = Path(tmp_path)
    for keep, held in ((2, (2, 0)), (0, (0, 3))):
        share = Share(four(tmp_path), threads=3, keep=keep)
        share.begin()
        assert seen(watcher) == held
        share.idle()
        assert seen(watcher) == (0, 0)


def seen(folder: Path) -> tuple[int, int]:
    """Kept and used, as another process sees it."""
    code = f"""
from pathlib import Path
from headway.worker.cores import KEPT, NICE, USED, Cores
cores = Cores()
cores.ids = [0, 1, 2, 3]
cores.open(Path({str(folder)!r}))
print(cores.held_by_others(KEPT), cores.held_by_others(USED))
"""
    kept, used = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return int(kept), int(used)


def test_a_folder_that_cannot_be_written_leaves_it_alone(tmp_path: Path) -> None:
    cores = Cores()
    cores.open(tmp_path / "missing")
    cores.hold(KEPT, 1)
    assert cores.held_by_others(KEPT) == 0


class Threaded(GatedEngine):
    """Remembers the threads and the nice value of each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.threads = 0
        self.forwards: list[tuple[int, int]] = []

    def use_threads(self, count: int) -> None:
        self.threads = count

    def forward(self, chunks: Sequence[Chunk], between: Callable[[], None] | None = None) -> list[Drawn | None]:
        self.forwards.append((self.threads, os.getpriority(os.PRIO_PROCESS, 0)))
        return super().forward(chunks)


@pytest.mark.parametrize("keep", [0, 2])
async def test_each_forward_has_the_threads_of_its_share(keep: int, tmp_path: Path) -> None:
    engine, share = Threaded(), Share(four(tmp_path), 4, keep)
    async with Bench(StepLimits(8, 64), engine=engine, share=share, folder=tmp_path).running() as bench:
        with other(tmp_path, KEPT, 1):
            await finished(bench, 150)
        await finished(bench, 151)
        await finished(bench, 152)
    mine = os.getpriority(os.PRIO_PROCESS, 0)
    nice = mine if keep else min(mine + NICE, 19)
    prompts = [forward for forward, batch in zip(engine.forwards, engine.batches, strict=True) if batch[0] > 1]
    assert prompts == [(3, nice)] * 3 + [(4, nice)] * 6
    assert seen(tmp_path) == (0, 0)


async def finished(bench: Bench, tokens: int) -> None:
    heard = Heard()
    bench.loop.start(sequence(list(range(tokens)), max_tokens=3), heard)
    await until_over(heard)


async def test_predictions_are_those_of_the_threads_in_use(tmp_path: Path) -> None:
    """Of four threads 1 ms a token is known; with two left nothing is known yet, so twice that is reckoned."""
    share, timing = Share(four(tmp_path), 4, keep=0), Timing(prefill=(0.0, 1e-3, 0.0))
    async with Bench(StepLimits(8, 64), share=share, folder=tmp_path, timing=timing).running() as bench:
        with other(tmp_path, KEPT, 2):
            bench.loop.steps.next({})
            assert bench.loop.steps.timing.predictor.prefill_s(100, 0) == pytest.approx(0.2)
        bench.loop.steps.next({})
        assert bench.loop.steps.timing is timing
