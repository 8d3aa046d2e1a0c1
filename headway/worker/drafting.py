"""Which drafts the sequences of a step get: as many as pay, by what was measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from headway.core.drafts import KEEP, KEEP_ALL, Acceptance, Lookup, share_drafts
from headway.core.fit import Timing
from headway.worker.active import Active

# One of so many steps that would have drafts has none: what a step takes without is measured on.
PLAIN = 16
# Tokens that a step looks up, of all its sequences: 0.6 ms of the event loop. A long prompt takes several steps.
AT_ONCE = 1 << 10


class Drafting:
    """Of one worker. most_s: what a step may take with its drafts. draft_s: what each adds to it."""

    def __init__(self, most_s: float, draft_s: Callable[[Timing], float] = lambda timing: timing.draft_s) -> None:
        self._most_s, self._draft_s = most_s, draft_s
        self._known = Acceptance(KEEP_ALL)
        self._steps = 0

    def drafts(self, actives: Sequence[Active], timing: Timing) -> list[list[int]]:
        """Of each of these, who decode in one step, beside which no prompt is computed."""
        lookups = [(self._lookup(active), room(active)) for active in actives]
        left = AT_ONCE
        for lookup, _ in lookups:
            left -= lookup.advance(left)
        step_s = timing.predictor.step_s(len(actives), sum(active.sequence.computed for active in actives))
        counts = share_drafts(lookups, step_s, self._draft_s(timing), self._most_s)
        self._steps += any(counts)
        if self._steps % PLAIN == 0:
            return [[] for _ in actives]
        return [lookup.drafts(count) for count, (lookup, _) in zip(counts, lookups, strict=True)]

    def _lookup(self, active: Active) -> Lookup:
        if active.lookup is None:
            sequence = active.sequence
            most = min(sequence.prompt_tokens + sequence.max_tokens, sequence.context_tokens)
            active.lookup = Lookup(sequence.tokens, max(2, most), Acceptance(KEEP, self._known))
        return active.lookup


def drafting_of(speculate: str, most_s: float) -> Drafting | None:
    """Of the setting of that name; most_s: what a step may take."""
    if speculate == "always":
        return Drafting(math.inf, lambda timing: 0.0)
    return Drafting(most_s) if speculate == "auto" else None


def room(active: Active) -> int:
    """The most drafts that are of use: the token after the last one may still be drawn, and all have slots."""
    sequence = active.sequence
    left = min(sequence.max_tokens - sequence.output_index, sequence.context_tokens - len(sequence.tokens))
    return max(0, min(left - 1, active.capacity - len(sequence.tokens)))
