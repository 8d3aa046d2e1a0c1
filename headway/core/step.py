"""What the next forward computes: all decoding sequences, then prompts in chunks, shortest first, within a budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from headway.core.order import order_key
from headway.core.predict import Predictor
from headway.core.sequence import Sequence

# A block: less would only cost forwards.
LEAST_CHUNK = 16


@dataclass(frozen=True, slots=True)
class StepLimits:
    """batch: sequences a forward. chunk_tokens: prompt tokens a forward, at most.

    chunk_s: seconds that a forward of prompts may take, because a short prompt that arrives meanwhile waits for it;
    shared_chunk_s: the same while others decode, because their next token waits for it.
    """

    batch: int = 64
    chunk_tokens: int = 8192
    chunk_s: float = 0.5
    shared_chunk_s: float = 0.1

    def budget(self, token_s: float, *, shared: bool) -> int:
        """Prompt tokens of the next forward, when each takes `token_s` seconds."""
        seconds = self.shared_chunk_s if shared else self.chunk_s
        tokens = seconds / token_s if token_s > 0 else self.chunk_tokens
        return min(self.chunk_tokens, max(LEAST_CHUNK, int(tokens)))


@dataclass(frozen=True, slots=True)
class Work:
    """Compute tokens [start, start + count) of `sequence`; `draws` when they are its last ones."""

    sequence: Sequence
    start: int
    count: int

    @property
    def draws(self) -> bool:
        return self.start + self.count == len(self.sequence.tokens)


def plan_step(ready: Iterable[Sequence], limits: StepLimits, predictor: Predictor) -> list[Work]:
    """Pick the next forward's work from the sequences that hold slots for it."""
    decoding: list[Sequence] = []
    prompts: list[Sequence] = []
    for sequence in ready:
        (decoding if sequence.decoding else prompts).append(sequence)
    work = [Work(sequence, sequence.computed, 1) for sequence in decoding[: limits.batch]]
    budget = limits.budget(predictor.prefill[1], shared=bool(work))
    if len(prompts) > 1:
        prompts.sort(key=lambda s: order_key(predictor.prefill_s(s.pending, s.computed), s.arrival_s, s.priority))
    for sequence in prompts:
        if budget <= 0 or len(work) >= limits.batch:
            break
        count = min(sequence.pending, budget)
        budget -= count
        work.append(Work(sequence, sequence.computed, count))
    return work
