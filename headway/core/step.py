"""What the next forward computes: all decoding sequences, then prompts in chunks, shortest first, within a budget."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from headway.core.order import order_key
from headway.core.sequence import Sequence


@dataclass(frozen=True, slots=True)
class StepLimits:
    """batch: sequences a forward; chunk_tokens: tokens a forward; shared_chunk_tokens: the same while others decode."""

    batch: int = 64
    chunk_tokens: int = 512
    shared_chunk_tokens: int = 64


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, start + count) of `sequence`; `draws` when they are its last ones."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


def plan_step(
    ready: Iterable[Sequence], limits: StepLimits, prefill_seconds: Callable[[int, int], float]
) -> list[Work]:
    """Pick the next forward's work from the sequences that hold slots for it.

    prefill_seconds(new, cached) predicts the time of a prefill; it orders the prompts.
    """
    decoding: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in ready:
        (decoding if sequence.decoding else prompts).append(sequence)
    work = [Work(sequence, sequence.computed, 1) for sequence in decoding[: limits.batch]]
    budget = limits.shared_chunk_tokens if work else limits.chunk_tokens
    if len(prompts) > 1:
        prompts.sort(key=lambda s: order_key(prefill_seconds(s.pending, s.computed), s.arrival_s, s.priority))
    for sequence in prompts:
        if budget <= 0 or len(work) >= limits.batch:
            break
        count = min(sequence.pending, budget)
        budget -= count
        work.append(Work(sequence, sequence.computed, count))
    return work
