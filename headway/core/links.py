"""When bytes would have come from another node: latency, bandwidth and what is on its way already."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

WEIGHT = 0.2
# Shorter pulls say more of latency than of bandwidth.
LEAST_BYTES = 1 << 20


@dataclass(slots=True)
class Link:
    """From one node to another. `free_s`: when all that was started is there, if the estimates hold.

    `count`: how often it was measured; `error`: mean of |predicted − taken| / taken, lately.
    """

    latency_s: float
    bytes_per_s: float
    free_s: float = 0.0
    count: int = 0
    error: float = 0.0

    def landing_s(self, size: int, now_s: float) -> float:
        """When `size` bytes would be there, were they asked for now."""
        return max(self.free_s, now_s) + self.latency_s + size / self.bytes_per_s

    def start(self, size: int, now_s: float) -> float:
        """They are asked for; when they are expected."""
        self.free_s = self.landing_s(size, now_s)
        return self.free_s

    def observe(self, size: int, seconds: float) -> None:
        """Pulls of `size` bytes in all kept the link busy for `seconds`."""
        if size < LEAST_BYTES or seconds <= 0:
            return
        byte_s = 1 / self.bytes_per_s
        if self.count:
            self.error += WEIGHT * (abs(byte_s * size - seconds) / seconds - self.error)
        # Averaged as seconds per byte: one slow pull must not count more than it lasted. What was measured first is
        # worth more than any guess.
        weight = WEIGHT if self.count else 1.0
        self.bytes_per_s = 1 / (byte_s + weight * (seconds / size - byte_s))
        self.count += 1


class Links:
    """A link for each pair of nodes, made when first asked for; the settings are the guess it starts from."""

    def __init__(self, latency_s: float, bytes_per_s: float) -> None:
        self._latency_s = latency_s
        self._bytes_per_s = bytes_per_s
        self._links: dict[tuple[str, str], Link] = {}

    def between(self, source: str, destination: str) -> Link:
        link = self._links.get((source, destination))
        if link is None:
            link = self._links[source, destination] = Link(self._latency_s, self._bytes_per_s)
        return link

    def __iter__(self) -> Iterator[tuple[str, str, Link]]:
        """(source, destination, link)"""
        return ((*pair, link) for pair, link in self._links.items())

    def forget(self, node: str) -> None:
        """The node is gone."""
        self._links = {pair: link for pair, link in self._links.items() if node not in pair}
