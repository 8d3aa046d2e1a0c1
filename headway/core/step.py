"""What the next forward computes: all decoding sequences, then prompts in chunks, in their order, within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from headway.core.fair import NO_DEBTS
from headway.core.order import Key, Order
from headway.core.predict import Predictor

# A block: less would only cost forwards.
LEAST_CHUNK = 16


class Runnable(Protocol):
    """A sequence that holds slots for what it has to compute. `pending` tokens follow the `computed` ones; the first
    `likely` tokens are probably cached by now.
    """

    @property
    def arrival_s(self) -> float: ...
    @property
    def priority(self) -> int: ...
    @property
    def tenant(self) -> str: ...
    @property
    def computed(self) -> int: ...
    @property
    def pending(self) -> int: ...
    @property
    def likely(self) -> int: ...
    @property
    def decoding(self) -> bool: ...


S = TypeVar("S", bound=Runnable)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """batch: sequences a forward, and one prompt more where all of them decode: its first token would wait for the end
    of an answer. chunk_tokens: prompt tokens a forward, at most.

    chunk_s: seconds that a forward of prompts may take, because a short prompt that arrives meanwhile waits for it;
    shared_chunk_s: what prompts may add to a forward in which others decode, because their next token waits for it;
    itl_s: what such a forward may take in all, though a block of a prompt is always in it.
    layers: in so many equal parts a forward of prompts falls, between which a prompt that goes first, and is done
    sooner than the rest, is computed (core.guest); 1: it waits for the end.
    """

    batch: int = 64
    chunk_tokens: int = 8192
    chunk_s: float = 0.15
    shared_chunk_s: float = 0.1
    itl_s: float = math.inf
    layers: int = 1

    def beside_s(self, step_s: float) -> float:
        """What prompts may add to a forward that takes `step_s` for those who decode."""
        return min(self.shared_chunk_s, self.itl_s - step_s)


# Every prompt in one piece.
UNCUT = StepLimits(chunk_tokens=1 << 40, chunk_s=math.inf, shared_chunk_s=math.inf)


@dataclass(frozen=True, slots=True)
class Work(Generic[S]):
    """Compute tokens [start, start + count) of `sequence`; `draws` when they are its last ones."""

    sequence: S
    start: int
    count: int
    draws: bool


def plan_step(
    ready: Iterable[S], limits: StepLimits, predictor: Predictor, order: Order, debts: Mapping[str, float] = NO_DEBTS
) -> list[Work[S]]:
    """Pick the next forward's work; `debts` are those of tenants (core.fair). Of more that decode than the batch has
    places, the first.

    A prompt shares a forward with those before it where what that saves (the forward's fixed cost, for it and for all
    behind it) is worth more than what it costs: those before it wait for its tokens.
    """
    decoding: list[S] = []
    prompts: list[S] = []
    for sequence in ready:
        (decoding if sequence.decoding else prompts).append(sequence)
    del decoding[limits.batch :]
    work = [Work(sequence, sequence.computed, 1, True) for sequence in decoding]
    if not prompts:
        return work
    fixed_s = predictor.prefill[0]
    left_s = limits.chunk_s + fixed_s
    if work:
        step_s = predictor.step_s(len(work), sum(sequence.computed for sequence in decoding))
        fixed_s += step_s
        left_s = limits.beside_s(step_s) + predictor.prefill[0]
    if len(prompts) > 1:
        prompts.sort(key=lambda prompt: prompt_key(prompt, predictor, order, debts))
    left = limits.chunk_tokens
    ending = 0
    for at, sequence in enumerate(prompts[: max(1, limits.batch - len(work))]):
        count = _chunk(sequence, left, predictor.tokens_within(left_s, sequence.computed), first=at == 0)
        chunk_s = predictor.prefill_s(count, sequence.computed) - predictor.prefill[0]
        least = min(LEAST_CHUNK, sequence.pending) if at else 1
        if count < least or chunk_s * ending > fixed_s * (len(prompts) - at):
            break
        draws = count == sequence.pending
        work.append(Work(sequence, sequence.computed, count, draws))
        ending += draws
        left -= count
        left_s -= chunk_s
    return work


def _chunk(sequence: Runnable, left: int, within: float, *, first: bool) -> int:
    """Tokens of its next chunk; the first in a forward gets at least a block, or it might never move."""
    if first:
        within = max(within, LEAST_CHUNK)
    most = min(sequence.pending, left)
    return most if within == math.inf else min(most, int(within))


def prompts_s(work: Iterable[Work[S]], predictor: Predictor) -> float:
    """What one forward of these prompts takes."""
    fixed_s = predictor.prefill[0]
    return fixed_s + sum(predictor.prefill_s(item.count, item.start) - fixed_s for item in work)


def prompt_key(
    prompt: Runnable, predictor: Predictor, order: Order, debts: Mapping[str, float] = NO_DEBTS, done: int = 0
) -> Key:
    """Its place among the waiting: smallest first. `done`: tokens that the forward that runs has computed of it."""
    cached = max(prompt.computed + done, prompt.likely)
    pending = prompt.pending - (cached - prompt.computed)
    debt_s = debts.get(prompt.tenant, 0.0)
    return order.key(predictor.prefill_s(pending, cached), pending, prompt.arrival_s, prompt.priority, debt_s)
