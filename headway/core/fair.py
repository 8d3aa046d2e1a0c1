"""Which tenants had more of a worker than their share: a flood of one delays that one, not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

NO_DEBTS: Mapping[str, float] = MappingProxyType({})
# Tenants that are remembered beside those that wait; those that had least are forgotten first.
MOST = 4096


class Fairness:
    """Counts the seconds of computing that each tenant's prompts got (VTC: Sheng et al., OSDI 2024, by seconds).

    A tenant's debt is what it got beyond the one that got least, among those that wait now; it is added to the
    keys of its prompts. A tenant that waits anew starts level with the one that got least, so that nobody saves up.
    """

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._waiting: frozenset[str] = frozenset()

    def debts(self, tenants: Iterable[str]) -> Mapping[str, float]:
        """Seconds, by tenant, for those that wait now; empty when that is only one."""
        waiting = frozenset(tenants)
        if waiting != self._waiting:
            self._level(waiting)
            self._waiting = waiting
        if len(waiting) < 2:
            return {}
        least = min(self._served[tenant] for tenant in waiting)
        return {tenant: self._served[tenant] - least for tenant in waiting}

    def charge(self, tenant: str, seconds: float) -> None:
        """A prompt of the tenant was computed for so long."""
        self._served[tenant] = self._served.get(tenant, 0.0) + seconds

    def _level(self, waiting: frozenset[str]) -> None:
        stayed = waiting & self._waiting
        level = min((self._served[tenant] for tenant in stayed), default=max(self._served.values(), default=0.0))
        for tenant in waiting - stayed:
            self._served[tenant] = max(level, self._served.get(tenant, 0.0))
        if len(self._served) > MOST + len(waiting):
            kept = sorted(self._served, key=lambda tenant: (tenant in waiting, self._served[tenant]))
            kept = kept[-MOST - len(waiting) :]
            self._served = {tenant: self._served[tenant] for tenant in kept}
