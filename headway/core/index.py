"""Which blocks lie where, as far as the nodes' block events say: a hint, never a promise."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence

from headway.core.keys import KEY_BYTES

# Of a key's 128 bits: an int of this size takes 32 bytes, and a wrong claim costs a recompute, nothing else.
_WORD = (1 << 60) - 1
_SHARDS = 4096
# Bit masks that are kept once for all blocks that have them.
_MASKS = 65536
# Of all blocks, that must be free before those left out are worth a new account of a node.
ROOM = 0.1


class PrefixIndex:
    """block key → the set of nodes that hold it, at most `max_blocks` keys in all.

    A set of nodes is an int with a bit for each node. The keys lie in 4,096 dicts, so that no operation has to touch
    or to grow more than a small part at once: when a node starts anew, its former bit is only marked as void, and each
    later call clears it from one dict until it can be given out again.

    Residence is prefix-closed, so that bisection over a chain of keys finds how far it is resident. Where that is
    broken for a moment the claim is wrong, and costs a recompute.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._shards: list[dict[int, int]] = [{} for _ in range(_SHARDS)]
        self._masks: dict[int, int] = {}
        self._total = 0
        self._bits: dict[str, int] = {}
        self._counts: dict[str, int] = {}
        self._full: set[str] = set()
        # Bits of accounts that are over: those that the sweep in progress clears, and those that came since it began.
        self._sweeping = self._void = 0
        self._swept = 0
        self._free_bits: list[int] = []
        self._bits_made = 0

    def __len__(self) -> int:
        return self._total

    def snapshot(self, node: str) -> None:
        """Forget all of a node: a complete account of it follows as stored blocks."""
        self.forget(node)
        self._bits[node] = self._new_bit()
        self._counts[node] = 0

    def stored(self, node: str, joined: bytes) -> bool:
        """Blocks are resident; `joined` keys, 16 bytes each. False when one was not learned because all is full."""
        if node not in self._bits:
            self.snapshot(node)
        bit, masks, shards = self._bits[node], self._masks, self._shards
        room = self._max_blocks - self._total
        new = count = 0
        complete = True
        for word in _words(joined):
            shard = shards[word & 4095]
            mask = shard.get(word)
            if mask is None:
                if new >= room:
                    complete = False
                    continue
                new += 1
                mask = 0
            if not mask & bit:
                mask |= bit
                shard[word] = masks.setdefault(mask, mask)
                count += 1
        self._total += new
        self._counts[node] += count
        if not complete:
            self._full.add(node)
        self._sweep(len(joined))
        return complete

    def removed(self, node: str, joined: bytes) -> None:
        """Blocks are no longer resident; unknown ones are ignored."""
        bit = self._bits.get(node, 0)
        for word in _words(joined):
            shard = self._shards[word & 4095]
            mask = shard.get(word, 0)
            if mask & bit:
                self._put(shard, word, mask & ~bit)
                self._counts[node] -= 1
        self._sweep(len(joined))

    def forget(self, node: str) -> None:
        """The node is gone."""
        bit = self._bits.pop(node, 0)
        if self._counts.pop(node, 0):
            self._void |= bit
        elif bit:
            self._free_bits.append(bit)
        self._full.discard(node)

    def overlap(self, keys: Sequence[bytes], block_size: int = 1) -> dict[str, int]:
        """How many leading tokens of the chain are resident, for every node that holds its first block."""
        # Sets of nodes, by how far they go; the furthest last.
        levels: list[tuple[int, int]] = []
        low, alive = 0, self._holders(keys[0]) if keys else 0
        while alive:
            # keys[low] is held by all of `alive`; find the last one that still is.
            high = len(keys)
            while high - low > 1:
                middle = (low + high) // 2
                if alive & ~self._holders(keys[middle]):
                    high = middle
                else:
                    low = middle
            low += 1
            left = self._holders(keys[low]) & alive if low < len(keys) else 0
            levels.append((alive & ~left, low * block_size))
            alive = left
        found: dict[str, int] = {}
        if levels:
            for node, bit in self._bits.items():
                for nodes, tokens in levels:
                    if bit & nodes:
                        found[node] = tokens
                        break
        return found

    def blocks(self, node: str) -> int:
        """Blocks known of the node."""
        return self._counts.get(node, 0)

    def full(self, node: str) -> bool:
        """Whether blocks of this node were left out since its last snapshot."""
        return node in self._full

    def may_relearn(self, node: str) -> bool:
        """Whether blocks of this node were left out, and there is room again for a tenth of all."""
        return node in self._full and self._total <= self._max_blocks * (1 - ROOM)

    def _holders(self, key: bytes) -> int:
        word = int.from_bytes(key[:8], sys.byteorder) & _WORD
        return self._shards[word & 4095].get(word, 0) & ~(self._void | self._sweeping)

    def _put(self, shard: dict[int, int], word: int, mask: int) -> None:
        if mask:
            shard[word] = self._masks.setdefault(mask, mask)
        else:
            del shard[word]
            self._total -= 1

    def _new_bit(self) -> int:
        if self._free_bits:
            return self._free_bits.pop()
        self._bits_made += 1
        return 1 << (self._bits_made - 1)

    def _sweep(self, size: int) -> None:
        """Clear void bits from a few dicts, the more the larger (in bytes) the message was."""
        if len(self._masks) > _MASKS:
            # Those in use stay with their blocks; from now on equal ones are shared again.
            self._masks.clear()
        for _ in range(min(4, 1 + size // 512)):
            if not self._sweeping:
                self._sweeping, self._void, self._swept = self._void, 0, 0
            if self._sweeping:
                self._sweep_one()

    def _sweep_one(self) -> None:
        shard = self._shards[self._swept]
        stale = [(word, mask) for word, mask in shard.items() if mask & self._sweeping]
        for word, mask in stale:
            self._put(shard, word, mask & ~self._sweeping)
        self._swept += 1
        if self._swept == _SHARDS:
            while self._sweeping:
                bit = self._sweeping & -self._sweeping
                self._free_bits.append(bit)
                self._sweeping ^= bit


def _words(joined: bytes) -> list[int]:
    """Of each key the first 60 bits. ValueError unless the length is a multiple of 16."""
    if len(joined) % KEY_BYTES:
        raise ValueError(f"block keys are {KEY_BYTES} bytes each; got {len(joined)} bytes")
    words = array("Q", joined)
    return [word & _WORD for word in words[::2]]
