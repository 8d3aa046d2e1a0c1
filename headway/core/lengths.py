"""How long answers are: learned from those of the same route."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

WEIGHT = 0.1
# Routes that are remembered, the last used ones.
MOST = 4096
# Tokens, before any answer was seen.
FIRST_GUESS = 256.0


class AnswerLengths:
    """Running means of output tokens, by route (what a route is, the caller says) and over all."""

    def __init__(self) -> None:
        self._routes: OrderedDict[Hashable, float] = OrderedDict()
        self._all = FIRST_GUESS

    def expect(self, route: Hashable, most: int) -> int:
        """Tokens that an answer of this route will likely have, where it can have at most `most`."""
        return max(1, min(most, round(self._routes.get(route, self._all))))

    def observe(self, route: Hashable, tokens: int) -> None:
        """An answer of the route had so many tokens."""
        self._all += WEIGHT * (tokens - self._all)
        mean = self._routes.pop(route, self._all)
        self._routes[route] = mean + WEIGHT * (tokens - mean)
        if len(self._routes) > MOST:
            self._routes.popitem(last=False)
