"""Drafts without a second model: an answer that ends as it, or its prompt, once did may go on as it did then.

Prompt lookup (Saxena, 2023). Drafts are computed beside the last token in one step; those that the model would have
drawn itself are kept. Whether a prediction held is known of every token, drafted or not, and costs nothing to count.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from heapq import heapify, heappop, heappush

# Lengths of the endings that are looked up, longest first.
ENDINGS = (4, 3, 2)
# Places that one sequence's tables have room for: three tables of 64 KiB at most.
MOST_PLACES, LEAST_PLACES = 1 << 14, 1 << 8
# In one step, of one sequence.
MOST_DRAFTS = 12
NOWHERE = -1

# Predictions are told apart by how many in a row held before: none, one, up to 3, more.
RUNS = 4
# What is known of all sequences counts as so many predictions of a new one.
KNOWN = 4.0
# What a prediction still counts for after each later one, of this sequence and of all.
KEEP, KEEP_ALL = 0.95, 0.99


class Acceptance:
    """How often predictions held, by how many in a row held before."""

    def __init__(self, keep: float, known: Acceptance | None = None) -> None:
        """keep: what each still counts for after a later one. known: where to start from; it learns as well."""
        self._keep, self._known = keep, known
        self._held = [0.0] * RUNS
        self._seen = [0.0] * RUNS

    def observe(self, run: int, held: bool) -> None:
        """A prediction after `run` in a row that held."""
        kind = _kind(run)
        self._held[kind] = self._keep * self._held[kind] + held
        self._seen[kind] = self._keep * self._seen[kind] + 1
        if self._known is not None:
            self._known.observe(run, held)

    def chance(self, run: int) -> float:
        """That the next prediction holds, after `run` in a row that held."""
        kind = _kind(run)
        known = self._known.chance(run) if self._known is not None else 0.5
        return (self._held[kind] + KNOWN * known) / (self._seen[kind] + KNOWN)


class Lookup:
    """Predicts what follows the last tokens of one sequence.

    A table has, by a hash of an ending's tokens, the place after its latest occurrence. What it says is checked: where
    two endings share an entry, one is not found. A prediction that holds is followed on, without looking up anything.
    """

    def __init__(self, tokens: Sequence[int], most_tokens: int, acceptance: Acceptance) -> None:
        """tokens: the sequence's own list, which grows to at most `most_tokens`."""
        places = min(MOST_PLACES, max(LEAST_PLACES, 1 << (most_tokens - 1).bit_length()))
        self.acceptance = acceptance
        self._tokens = tokens
        self._tables = [array("i", [NOWHERE]) * places for _ in ENDINGS]
        # Tokens [0, taken) are in the tables; the first `told` were compared with what was predicted.
        self._taken, self._told = 0, len(tokens)
        # Where the next token is predicted from, and how many predictions in a row have held.
        self._at, self.run = NOWHERE, 0

    def advance(self, most: int) -> int:
        """Take in the tokens that came since, at most so many of them: 0.6 µs each. How many."""
        tokens, end = self._tokens, len(self._tokens)
        while self._told < end:
            if self._at != NOWHERE:
                held = tokens[self._at] == tokens[self._told]
                self.acceptance.observe(self.run, held)
                self._at, self.run = (self._at + 1, self.run + 1) if held else (NOWHERE, 0)
            self._told += 1
        taken = min(most, end - self._taken)
        # Nothing says yet what follows the last token.
        self._take(self._taken, self._taken + taken)
        self._taken += taken
        if self._at == NOWHERE:
            self._at = self._find()
        return taken

    def drafts(self, count: int) -> list[int]:
        """The next `count` tokens, if all goes on as predicted; none where nothing is predicted."""
        if self._at == NOWHERE:
            return []
        found = list(self._tokens[self._at : self._at + count])
        # A text that repeats its own end goes on with what is predicted.
        period = len(self._tokens) - self._at
        while len(found) < count:
            found.append(found[len(found) - period])
        return found

    def chance(self, after: int) -> float:
        """That a draft holds, if `after` drafts before it do; 0 where nothing is predicted."""
        return 0.0 if self._at == NOWHERE else self.acceptance.chance(self.run + after)

    def _take(self, start: int, stop: int) -> None:
        """The endings before each of these places are followed by its token."""
        for size, table in zip(ENDINGS, self._tables, strict=True):
            first, mask = max(start, size), len(table) - 1
            last = max(first, stop)
            endings = zip(*(self._tokens[first - back : last - back] for back in range(size, 0, -1)), strict=True)
            for place, ending in enumerate(endings, first):
                table[hash(ending) & mask] = place

    def _find(self) -> int:
        """The place after the latest occurrence of the longest ending that is known."""
        tokens, end = self._tokens, len(self._tokens)
        for size, table in zip(ENDINGS, self._tables, strict=True):
            if size > end:
                continue
            ending = tokens[end - size :]
            place = table[hash(tuple(ending)) & len(table) - 1]
            if place != NOWHERE and tokens[place - size : place] == ending:
                return place
        return NOWHERE


def share_drafts(sequences: Sequence[tuple[Lookup, int]], step_s: float, row_s: float, most_s: float) -> list[int]:
    """How many drafts each sequence of a step gets: those that gain more tokens a second than the step has without.

    sequences: all that decode, each with the most drafts that it has room for. Without drafts the step takes `step_s`,
    each adds `row_s`, and it may take `most_s` with them.
    """
    counts = [0] * len(sequences)
    tokens, seconds = float(len(sequences)), step_s
    # Of each sequence the next draft, by the chance that it is kept; a later one's is never more.
    offers = [(-lookup.chance(0), at) for at, (lookup, room) in enumerate(sequences) if room > 0]
    heapify(offers)
    while offers and seconds + row_s <= most_s:
        gain, at = heappop(offers)
        if -gain * seconds <= row_s * tokens:
            break
        counts[at] += 1
        tokens, seconds = tokens - gain, seconds + row_s
        lookup, room = sequences[at]
        if counts[at] < min(room, MOST_DRAFTS):
            heappush(offers, (gain * lookup.chance(counts[at]), at))
    return counts


def _kind(run: int) -> int:
    return min(run.bit_length(), RUNS - 1)
