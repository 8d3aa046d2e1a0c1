"""A kvstore of a few lines for tests of the engine loop: grants, joins, extends, releases; seals nothing away."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt

from headway.v1 import kvstore_pb2 as pb
from headway.worker.attach import OnReply, Slab

BLOCK = 16


class LittleStore:
    """Stands where an Attachment stands. Replies come in a later loop tick, as over a stream."""

    def __init__(self, slots: int = 64) -> None:
        self.memory: npt.NDArray[np.uint8] = np.full((slots, 4096), 255, np.uint8)
        self.free = list(range(slots))
        self.leases: dict[int, list[int]] = {}
        self.sealed: list[bytes] = []
        self.operations: list[str] = []
        self.refuse_extend = False
        # Seconds until the reply to a seal comes.
        self.seal_delay_s = 0.0
        self._last_lease = 0

    def slab(self) -> Slab:
        return Slab(self.memory, 1, "node", len(self.memory), len(self.free))

    def submit(self, operation: pb.AttachOperation, on_reply: OnReply | None = None) -> None:
        kind = operation.WhichOneof("operation")
        assert kind is not None
        self.operations.append(kind)
        reply = getattr(self, f"_{kind}", lambda _: pb.AttachReply(done=pb.Done()))(getattr(operation, kind))
        if on_reply is not None:
            delay_s = self.seal_delay_s if kind == "seal" else 0.0
            asyncio.get_running_loop().call_later(delay_s, on_reply, reply)

    def _acquire(self, acquire: pb.AcquireLease) -> pb.AttachReply:
        blocks = -(-(acquire.tokens + acquire.growth_tokens) // BLOCK)
        self._last_lease += 1
        self.leases[self._last_lease] = slots = [self.free.pop() for _ in range(blocks)]
        pulling = bool(acquire.pull.kvstore)
        return pb.AttachReply(granted=pb.LeaseGranted(lease_id=self._last_lease, slots=slots, pulling=pulling))

    def _join(self, join: pb.JoinLease) -> pb.AttachReply:
        slots = self.leases.get(join.lease_id)
        if slots is None:
            return pb.AttachReply(failure={"code": 5, "message": "no such lease", "retryable": True})
        return pb.AttachReply(granted=pb.LeaseGranted(lease_id=join.lease_id, slots=slots))

    def _extend(self, extend: pb.ExtendLease) -> pb.AttachReply:
        if self.refuse_extend:
            self.refuse_extend = False
            return pb.AttachReply(failure={"code": 10, "message": "reclaimed", "retryable": True})
        slots = [self.free.pop() for _ in range(extend.blocks)]
        self.leases[extend.lease_id] += slots
        return pb.AttachReply(extended=pb.SlotsAdded(slots=slots))

    def _seal(self, seal: pb.SealBlocks) -> pb.AttachReply:
        self.sealed += [seal.block_keys[at : at + 16] for at in range(0, len(seal.block_keys), 16)]
        return pb.AttachReply(sealed=pb.BlocksSealed())

    def _release(self, release: pb.ReleaseLease) -> pb.AttachReply:
        freed = self.leases.pop(release.lease_id, [])
        # What a released slot held must not matter to anyone.
        self.memory[freed] = 255
        self.free += freed
        return pb.AttachReply(done=pb.Done())
