"""The operations that workers send, run on the node's store."""

from __future__ import annotations

import math
import time

from headway.core.keys import split_keys
from headway.core.leases import Done, Problem, Refused, Result, Source
from headway.runtime.errors import HeadwayError, invalid
from headway.v1 import kvstore_pb2 as pb
from services.kvstore.convert import reply_of
from services.kvstore.node import Node
from services.kvstore.session import Session


class Operations:
    """Of all workers of `node`."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def handle(self, session: Session, operations: pb.AttachOperations) -> None:
        """Run operations in order; results that do not have to wait are answered in one message."""
        session.heard_s = time.monotonic()
        for operation in operations.operations:
            kind = operation.WhichOneof("operation") or ""
            try:
                result = self._run(session, kind, operation)
            except HeadwayError as error:
                result = Refused(Problem.INVALID, error.message)
            if result is not None and operation.operation_id:
                session.put(reply_of(kind, operation.operation_id, result))
        self._node.settle()

    def _run(self, session: Session, kind: str, operation: pb.AttachOperation) -> Result | None:
        store, key, now = self._node.store, session.key, time.monotonic()
        if kind == "acquire":
            return self._acquire(session, operation.operation_id, operation.acquire, now)
        if kind == "seal":
            seal = operation.seal
            keys = _keys(seal.block_keys)
            return store.seal(key, seal.lease_id, first=seal.first_block, keys=keys, parent=seal.parent_key)
        if kind == "join":
            lease_id = operation.join.lease_id if operation.join.epoch == self._node.epoch else 0
            return store.join(key, session.worker_id, lease_id)
        if kind == "extend":
            extend = operation.extend
            deadline_s = now + _finite(extend.timeout_s, "timeout_s")
            return store.extend(
                key, operation.operation_id, extend.lease_id, blocks=extend.blocks, deadline_s=deadline_s
            )
        if kind == "release":
            return store.release(key, operation.release.lease_id)
        if kind == "refresh":
            return store.refresh(key, operation.refresh.lease_id, operation.refresh.from_token)
        if kind == "hand_off":
            lease_id = operation.hand_off.lease_id
            if self._nobody_joins(lease_id):
                return store.release(key, lease_id)
            return store.hand_off(key, lease_id, now, self._joiner_of(lease_id))
        if kind == "offer":
            return store.offer(key, operation.offer.lease_id, self._joiner_of(operation.offer.lease_id))
        if kind == "finish_pull":
            if self._node.pulls is not None and operation.finish_pull.lease_id in store.leases:
                self._node.pulls.finish(operation.finish_pull.lease_id)
            return Done()
        if kind == "cancel_acquire":
            cancel = operation.cancel_acquire
            store.cancel_acquire(key, (cancel.sequence_id, cancel.attempt))
            return Done()
        if kind == "renew":
            # Like every message, a sign of life: `handle` has noted it.
            return Done()
        raise invalid("this kvstore does not know the operation; run workers and kvstore of the same version")

    def _acquire(self, session: Session, operation_id: int, acquire: pb.AcquireLease, now: float) -> Result | None:
        keys = _keys(acquire.block_keys)
        return self._node.store.acquire(
            session.key,
            operation_id,
            keys=keys,
            tokens=acquire.tokens,
            growth=acquire.growth_tokens,
            arrival_s=_finite(acquire.arrival_s, "arrival_s"),
            deadline_s=now + _finite(acquire.timeout_s, "timeout_s"),
            joiner=acquire.joiner,
            request=(acquire.sequence_id, acquire.attempt),
            source=self._source(acquire, keys),
        )

    def _source(self, acquire: pb.AcquireLease, keys: list[bytes]) -> Source | None:
        """Where what the slab lacks comes from, if not from computing it."""
        pull, token_s = acquire.pull, _finite(acquire.prefill_token_s, "prefill_token_s")
        if pull.kvstore:
            return Source(pull.kvstore, pull.blocks, pull.follow, token_s)
        if self._node.tiering is not None and self._node.tiering.tiers:
            most = (acquire.tokens - 1) // self._node.block_size
            missing = keys[len(self._node.store.cache.match(keys, most)) : max(0, most)]
            if missing and self._node.tiering.promising(missing, token_s):
                return Source("", prefill_token_s=token_s)
        return None

    def _nobody_joins(self, lease_id: int) -> bool:
        """The other node that was to go on with the lease has given up on it."""
        lease = self._node.store.leases.get(lease_id)
        if lease is None or not lease.remote:
            return False
        readers = self._node.readers.values()
        return any(reader.joiner == lease.joiner and reader.misses(lease.request) for reader in readers)

    def _joiner_of(self, lease_id: int) -> str | None:
        """The session of the worker, or the reader of the node, that is expected to join the lease, if it is here."""
        lease = self._node.store.leases.get(lease_id)
        if lease is None or not lease.joiner:
            return None
        if lease.remote:
            readers = self._node.readers.values()
            here = (reader for reader in readers if reader.joiner == lease.joiner and reader.follows(lease.request))
            return next((reader.key for reader in here), None)
        for session in self._node.sessions.values():
            if session.worker_id == lease.joiner and session.connected and session.pidfd is not None:
                return session.key
        return None


def _keys(joined: bytes) -> list[bytes]:
    try:
        return split_keys(joined)
    except ValueError as error:
        raise invalid(str(error)) from None


def _finite(seconds: float, name: str) -> float:
    """Anything else could neither be ordered nor run out."""
    if not math.isfinite(seconds):
        raise invalid(f"{name} is {seconds}; it must be a finite number of seconds")
    return seconds
