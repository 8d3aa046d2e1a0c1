"""In which order waiting prompts are computed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

# Smallest first.
Key = tuple[int, float]


class Rule(enum.Enum):
    """SHORTEST is ours; ARRIVAL and WSPT are those of the reference router's queue: fcfs, (1 + priority) / tokens."""

    SHORTEST = "shortest"
    ARRIVAL = "arrival"
    WSPT = "wspt"


@dataclass(frozen=True, slots=True)
class Order:
    """SHORTEST: higher priority, then remaining seconds + ageing · arrival ("best found", docs/routing.md).

    So nothing of the same tenant that arrives more than remaining / ageing later goes first (a tenth: ten times the
    work), and no prompt of the highest priority waits for ever. 0 is shortest first without a bound; the larger, the
    nearer to first come, first served.
    """

    rule: Rule = Rule.SHORTEST
    ageing: float = 0.1

    def key(self, remaining_s: float, tokens: int, arrival_s: float, priority: int = 0, debt_s: float = 0.0) -> Key:
        """`remaining_s` and `tokens` are what is left to compute; `arrival_s` is of any clock that all share.

        `debt_s`: what the tenant had beyond its share (core.fair).
        """
        if self.rule is Rule.SHORTEST:
            return (-priority, remaining_s + debt_s + self.ageing * arrival_s)
        if self.rule is Rule.ARRIVAL:
            return (-priority, arrival_s)
        return (0, tokens / (1 + max(0, priority)))

    def advanced(self, key: Key, done_s: float) -> Key:
        """The key of a prompt of which `done_s` were computed since it had `key`, as near as can be told from that."""
        return (key[0], key[1] - done_s) if self.rule is Rule.SHORTEST else key
