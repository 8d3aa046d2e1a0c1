"""The source side between kvstores: what other nodes' stores hold here, and what they are told of."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from headway.core.keys import split_keys
from headway.core.leases import REMOTE, Granted
from headway.v1 import transfer_pb2 as pb

if TYPE_CHECKING:
    from services.kvstore.node import Node

SECRET_BYTES = 32
GIVEN_UP_KEPT = 4096
Request = tuple[str, int]


@dataclass(slots=True)
class _Follow:
    """A sequence that is told of: all blocks before `told` were."""

    pull_id: int
    told: int


class Reader:
    """One Connect stream of another store. It holds leases under `key`, as a worker does, but never writes."""

    def __init__(self, node: Node, node_id: str) -> None:
        self.key = f"{REMOTE}{node_id}/{secrets.token_hex(8)}"
        self.joiner = f"{REMOTE}{node_id}"
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.responses: list[pb.ConnectResponse] = []
        self.wake = asyncio.Event()
        self._node = node
        self._leases: dict[int, int] = {}
        self._follows: dict[Request, _Follow] = {}
        # Given up before the handoff, the last ones; True once the handoff has come.
        self._given_up: OrderedDict[Request, bool] = OrderedDict()
        node.store.readers.add(self.key)

    def follows(self, request: Request) -> bool:
        return request in self._follows

    def misses(self, request: Request) -> bool:
        """At a handoff: it followed this sequence, and does not want it any more."""
        if request in self._given_up:
            self._given_up[request] = True
        return request in self._given_up

    def put(self, response: pb.ConnectResponse) -> None:
        """Send with all else of this loop tick."""
        self.responses.append(response)
        self.wake.set()

    # ------------------------------------------------------------------ what it asks for

    def pin(self, pin: pb.PinBlocks) -> None:
        """Raises ValueError on keys that are none."""
        granted = self._node.store.pin(self.key, split_keys(pin.block_keys), pin.arrival_s)
        if granted.lease_id:
            self._leases[pin.pull_id] = granted.lease_id
        self._tell(pin.pull_id, pin.first_block, granted.slots[pin.first_block :], last=True)

    def follow(self, follow: pb.FollowSequence) -> None:
        """From `first_block` on, also when it was told already; a lease that waits for this reader is taken over."""
        request = (follow.sequence_id, follow.attempt)
        if self._given_up.pop(request, False):
            self._tell(follow.pull_id, follow.first_block, [], last=True)
            return
        self._follows[request] = _Follow(follow.pull_id, follow.first_block)
        store = self._node.store
        for lease in store.leases.values():
            if lease.request == request and lease.joiner == self.joiner:
                self.filled(lease.lease_id)
                if lease.held_until_s is not None:
                    granted = store.join(self.key, self.joiner, lease.lease_id)
                    if isinstance(granted, Granted):
                        self.handed_off(request, granted)
                return

    def release(self, pull_id: int) -> None:
        for request in [request for request, follow in self._follows.items() if follow.pull_id == pull_id]:
            del self._follows[request]
            self._given_up[request] = False
            if len(self._given_up) > GIVEN_UP_KEPT:
                self._given_up.popitem(last=False)
        lease_id = self._leases.pop(pull_id, None)
        if lease_id is not None:
            self._node.store.release(self.key, lease_id)

    def close(self) -> None:
        """The stream ended: it holds nothing any more."""
        self._node.store.resolve(self.key)
        self._node.store.readers.discard(self.key)

    # ------------------------------------------------------------------ what it is told

    def filled(self, lease_id: int) -> None:
        """More blocks of a lease are sealed."""
        lease = self._node.store.leases.get(lease_id)
        if lease is None or lease.joiner != self.joiner or (follow := self._follows.get(lease.request)) is None:
            return
        if len(lease.blocks) > follow.told:
            slots = [block.slot for block in lease.blocks[follow.told :]]
            self._tell(follow.pull_id, follow.told, slots, last=False)
            follow.told = len(lease.blocks)

    def handed_off(self, request: Request, granted: Granted) -> None:
        """Prefill is done with the lease: all of the sequence can be read, and nobody writes to it any more."""
        lease = self._node.store.leases.get(granted.lease_id)
        follow = self._follows.pop(request, None)
        if lease is None:
            # Older requests took its slots in the same breath.
            if follow is not None:
                self._tell(follow.pull_id, follow.told, [], last=True)
            return
        if follow is None:
            self._node.store.release(self.key, granted.lease_id)
            return
        self._leases[follow.pull_id] = granted.lease_id
        blocks = -(-lease.tokens // self._node.block_size)
        self._tell(follow.pull_id, follow.told, lease.slots[follow.told : blocks], last=True, tokens=lease.tokens)

    def _tell(self, pull_id: int, first: int, slots: list[int], *, last: bool, tokens: int = 0) -> None:
        generations = [self._node.memory.generation(slot) for slot in slots]
        held = pb.BlocksHeld(
            pull_id=pull_id, first_block=first, slots=slots, generations=generations, last=last, tokens=tokens,
            epoch=self._node.epoch,
        )  # fmt: skip
        self.put(pb.ConnectResponse(held=held))
