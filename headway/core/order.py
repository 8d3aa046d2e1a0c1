"""In which order waiting prompts are computed: shortest remaining work first, with ageing."""

from __future__ import annotations

AGEING = 0.25


def order_key(remaining_s: float, arrival_s: float, priority: int = 0) -> tuple[int, float]:
    """Smallest first: higher priority, then remaining seconds + arrival / 4.

    Nothing that arrives more than 4 · remaining later goes first, so no prompt waits forever ("best found" in the
    simulation on the Mooncake traces).
    """
    return (-priority, remaining_s + AGEING * arrival_s)
