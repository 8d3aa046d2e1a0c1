"""Which blocks lie where, as far as the nodes' block events say: a hint, never a promise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixIndex:
    """The resident block keys of every node, at most `max_blocks` a node.

    Residence is prefix-closed, so that one bisection over a chain of keys finds how far it is resident. Where that is
    broken for a moment the claim is wrong, and costs a recompute.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._nodes: dict[str, set[bytes]] = {}
        self._full: set[str] = set()

    def snapshot(self, node: str) -> None:
        """Forget all of a node: a complete account of it follows as stored blocks."""
        self._nodes[node] = set()
        self._full.discard(node)

    def stored(self, node: str, keys: Sequence[bytes]) -> bool:
        """Blocks are resident. False when the node has more blocks than are kept: the rest is not learned."""
        resident = self._nodes.setdefault(node, set())
        room = self._max_blocks - len(resident)
        resident.update(keys[:room])
        if len(keys) > room:
            self._full.add(node)
            return False
        return True

    def removed(self, node: str, keys: Iterable[bytes]) -> None:
        """Blocks are no longer resident."""
        self._nodes.setdefault(node, set()).difference_update(keys)

    def forget(self, node: str) -> None:
        """The node is gone."""
        self._nodes.pop(node, None)
        self._full.discard(node)

    def overlap(self, keys: Sequence[bytes]) -> dict[str, int]:
        """For every node, how many leading blocks of the chain are resident."""
        return {node: _leading(keys, resident) for node, resident in self._nodes.items()}

    def blocks(self, node: str) -> int:
        """Blocks known of the node."""
        return len(self._nodes.get(node, ()))

    def full(self, node: str) -> bool:
        """Whether blocks of this node were left out since its last snapshot."""
        return node in self._full


def _leading(keys: Sequence[bytes], resident: set[bytes]) -> int:
    """keys[:low] are resident, keys[high:] are not."""
    low, high = 0, len(keys)
    if not high or keys[0] not in resident:
        return 0
    while low < high:
        middle = (low + high) // 2
        if keys[middle] in resident:
            low = middle + 1
        else:
            high = middle
    return low
