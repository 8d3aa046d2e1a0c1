"""Whether blocks come faster from a tier below the slab than from computing them, by what both took lately."""

from __future__ import annotations

WEIGHT = 0.2
# What was slow once is tried again after so many refusals: nobody would measure it otherwise.
RETRY = 64
# A question whose answer may be "nothing" must cost so much less than what it may save.
QUESTION_SHARE = 0.1


class ReadCost:
    """Running averages (exponential, weight 0.2) of the seconds for a block, and for an answer without blocks.

    0 until measured; what is not measured yet is worth a try.
    """

    def __init__(self) -> None:
        self.block_s = self.ask_s = 0.0
        self._reading = 0
        self._refused = 0

    def begin(self, blocks: int) -> None:
        """So many blocks are being read from now on."""
        self._reading += blocks

    def ended(self, blocks: int, good: int, seconds: float) -> None:
        """Of the `blocks` that were to be read, `good` came; all of it took `seconds`, waiting included."""
        self._reading -= blocks
        if good:
            self.block_s = _average(self.block_s, seconds / good)
        else:
            self.ask_s = _average(self.ask_s, seconds)

    def beats(self, blocks: int, compute_s: float) -> bool:
        """Reading is faster than computing the same tokens in `compute_s` (0: not known)."""
        if not compute_s or (self._reading + blocks) * self.block_s < compute_s:
            return True
        return self._after_refusals()

    def may_ask(self, compute_s: float) -> bool:
        """Asking whether there is anything is cheap beside computing what there may be in `compute_s`."""
        return not compute_s or self.ask_s <= QUESTION_SHARE * compute_s or self._after_refusals()

    def _after_refusals(self) -> bool:
        self._refused = (self._refused + 1) % RETRY
        return not self._refused


def _average(before: float, value: float) -> float:
    return before + WEIGHT * (value - before) if before else value
