"""A mover of two child processes over the shared slabs: what raw TCP, NIXL, Mooncake and Redis have in common.

A candidate is a way of starting the pair and of asking it. All candidates are started, tried at every size, and the
best one of a size is used for it. Pairs that poll are stopped (SIGSTOP) while others have their turn.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from bench.report import median
from bench.transfer.contract import BLOCK_BYTES, Mover, MoverError, Sample
from bench.transfer.process import Side
from bench.transfer.slabs import Slabs

Options = tuple[tuple[str, Any], ...]
FIRST_REPEATS, FINALISTS, FINAL_REPEATS = 3, 4, 5
SIZE_OF_ALL_TRIALS = 64  # blocks; above it only the finalists of the size before are tried


@dataclass(frozen=True)
class Candidate:
    """Options that the sides are started with, environment variables of both, and options of every question."""

    config: Options = ()
    env: Options = ()
    question: Options = ()

    @property
    def launch(self) -> tuple[Options, Options]:
        return self.config, self.env

    def as_dict(self) -> dict[str, Any]:
        return dict(self.config) | dict(self.env) | dict(self.question)


class PairMover(Mover):
    """Source and target are child processes; the source is asked to move and measures the seconds by itself."""

    quick_candidates = 1  # how many of them a quick run tries
    polls = False  # whether its threads burn CPU while nothing moves

    def __init__(self, slabs: Slabs, python: str | None) -> None:
        self.slabs = slabs
        self.python = python or ""
        self.setting = {}
        self.ranked: dict[int, list[Candidate]] = {}
        self._pairs: dict[tuple[Options, Options], tuple[Side, Side]] = {}
        self._sides: list[Side] = []

    @abstractmethod
    def candidates(self) -> list[Candidate]:
        """What may be tried, the likely best first."""

    @abstractmethod
    def start(self, candidate: Candidate) -> tuple[Side, Side]:
        """Start source and target with `side`, and connect them."""

    def tried(self) -> list[Candidate]:
        """The candidates of this run."""
        return self.candidates()[: self.quick_candidates] if self.quick else self.candidates()

    def open(self) -> None:
        for candidate in self.tried():
            if candidate.launch not in self._pairs:
                self._pairs[candidate.launch] = pair = self.start(candidate)
                self._rest(pair)

    def side(self, module: str, role: str, candidate: Candidate, **more: Any) -> Side:
        """Start one side and wait until it is ready."""
        slabs = self.slabs
        descriptor = slabs.source_fd if role == "source" else slabs.target_fd
        config = {
            "role": role,
            "fd": descriptor,
            "slab_bytes": slabs.bytes,
            "stride": slabs.stride,
            "block_bytes": BLOCK_BYTES,
            "source_slots": slabs.source_slots,
            "target_slots": slabs.target_slots,
        }
        config |= dict(candidate.config) | more
        side = Side(self.python, module, config, [descriptor], dict(candidate.env))
        self._sides.append(side)
        side.answer()
        return side

    def close(self) -> None:
        for side in self._sides:
            side.close()
        self._sides, self._pairs = [], {}

    def tune(self, sizes: list[int]) -> None:
        """Try all candidates of a size, then the best few more often, and keep their order."""
        before: list[Candidate] = []
        for blocks in sorted(sizes):
            first: dict[Candidate, float] = {}
            finalists = before
            if not before or blocks <= SIZE_OF_ALL_TRIALS:
                first = self._trial(self.tried(), blocks, FIRST_REPEATS)
                finalists = sorted(first, key=lambda candidate: first[candidate])[:FINALISTS]
            final = self._trial(finalists, blocks, FINAL_REPEATS)
            self.ranked[blocks] = sorted(final, key=lambda candidate: final[candidate])
            before = self.ranked[blocks] if blocks >= SIZE_OF_ALL_TRIALS else []
            speeds = {c: round(blocks * BLOCK_BYTES / seconds / 1e9, 3) for c, seconds in (first | final).items()}
            trials = [{**candidate.as_dict(), "gb_s": speed} for candidate, speed in speeds.items()]
            self.setting[str(blocks)] = {"best": self.ranked[blocks][0].as_dict(), "tried": trials}

    def _trial(self, candidates: list[Candidate], blocks: int, repeats: int) -> dict[Candidate, float]:
        """Median seconds of each candidate that works, in turns. Raises MoverError where none does."""
        seconds: dict[Candidate, list[float]] = {candidate: [] for candidate in candidates}
        for _ in range(repeats):
            for candidate in list(seconds):
                try:
                    seconds[candidate].append(self._move(candidate, blocks).seconds)
                except MoverError as error:
                    self.setting.setdefault("failed", {})[str(candidate.as_dict())] = str(error)
                    del seconds[candidate]
        if not seconds:
            raise MoverError(f"{self.name}: no setting works: {self.setting['failed']}")
        return {candidate: median(values) for candidate, values in seconds.items()}

    def move(self, blocks: int) -> Sample:
        best = self.ranked.get(blocks) or self.tried()
        return self._move(best[0], blocks)

    def _move(self, candidate: Candidate, blocks: int) -> Sample:
        source, target = self._pairs[candidate.launch]
        self._wake((source, target))
        before = source.cpu_s, target.cpu_s, self.cpu_between_s()
        answer = source.ask(blocks=blocks, **dict(candidate.question))
        after = source.cpu_s, target.cpu_s, self.cpu_between_s()
        self._rest((source, target))
        at_source, at_target, between = (late - early for early, late in zip(before, after, strict=True))
        return Sample(answer["seconds"], at_source, at_target, between)

    def _wake(self, pair: tuple[Side, Side]) -> None:
        if self.polls:
            for side in pair:
                side.resume()
            pair[1].ask()  # it runs again once it answers

    def _rest(self, pair: tuple[Side, Side]) -> None:
        if self.polls:
            for side in pair:
                side.pause()

    def cpu_between_s(self) -> float:
        """CPU seconds so far of a server between the two sides."""
        return 0.0

    def verify(self, blocks: int) -> None:
        self.slabs.clear_target()
        self.move(blocks)
        self.slabs.check_scattered(blocks)
