"""A simulated node: the prefix cache that its workers share."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence


class SimNode:
    """At most `capacity` block keys; least recently used ones go first, leaves before what they continue.

    `on_stored` and `on_removed` hear of changes.
    """

    def __init__(
        self,
        name: str,
        capacity: int,
        on_stored: Callable[[str, list[bytes]], None],
        on_removed: Callable[[str, list[bytes]], None],
    ) -> None:
        self.name = name
        self._capacity = capacity
        self._on_stored = on_stored
        self._on_removed = on_removed
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def leading(self, keys: Sequence[bytes]) -> int:
        """How many leading blocks of the chain are here. Residence is not always prefix-closed, so it walks."""
        blocks = self._blocks
        count = 0
        for key in keys:
            if key not in blocks:
                break
            count += 1
        return count

    def use(self, keys: Sequence[bytes]) -> None:
        """Blocks that are here are read."""
        for key in reversed(keys):
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def add(self, keys: Sequence[bytes]) -> None:
        """A chain from its root is here now; what it does not leave room for is gone."""
        if not self._capacity:
            return
        blocks = self._blocks
        stored = [key for key in keys if key not in blocks]
        for key in reversed(keys):
            blocks[key] = None
            blocks.move_to_end(key)
        removed = [blocks.popitem(last=False)[0] for _ in range(len(blocks) - self._capacity)]
        if stored:
            self._on_stored(self.name, stored)
        if removed:
            self._on_removed(self.name, removed)
