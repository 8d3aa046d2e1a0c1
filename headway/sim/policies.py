"""The policies by name: how requests are placed, and in which order workers compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from headway.core.baselines import BASELINES, Draw
from headway.core.order import Order, Rule
from headway.core.policy import LeastDelay, Planner, Policy

ARRIVAL = Order(Rule.ARRIVAL)
# The reference's threshold is in units of a worker's largest batch.
MAX_BATCHED_TOKENS = 2048


@dataclass(frozen=True)
class Entry:
    """`queue_tokens`: a queue at the router holds requests while every worker has more than so many tokens to compute;
    None: there is none. Its order is `held`. `local`: decode workers may compute prompts by themselves.
    """

    name: str
    make: Callable[[Planner, Draw], Policy]
    order: Order = ARRIVAL
    queue_tokens: int | None = None
    held: Order = ARRIVAL
    local: bool = False


def entries(order: Order | None = None) -> dict[str, Entry]:
    """All policies; `order` is that of ours."""
    known = [Entry(name, make, local=name == "reference-local") for name, make in BASELINES.items()]
    reference = BASELINES["reference"]
    for threshold in (0, 1):
        tokens = threshold * MAX_BATCHED_TOKENS
        known += [
            Entry(f"reference-fcfs-{threshold}", reference, queue_tokens=tokens),
            Entry(f"reference-wspt-{threshold}", reference, queue_tokens=tokens, held=Order(Rule.WSPT)),
        ]
    known.append(Entry("headway", lambda planner, draw: LeastDelay(planner), order or Order(), local=True))
    return {entry.name: entry for entry in known}
