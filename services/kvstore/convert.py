"""Results of the store as replies of the Attach stream."""

from __future__ import annotations

import grpc

from headway.core.leases import Added, Changed, Granted, Problem, Refused, Result
from headway.v1 import kvstore_pb2 as pb

CODES = {
    Problem.NO_SLOTS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Problem.TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Problem.RECLAIMED: grpc.StatusCode.ABORTED,
    Problem.UNKNOWN: grpc.StatusCode.NOT_FOUND,
    Problem.NOT_YOURS: grpc.StatusCode.PERMISSION_DENIED,
    Problem.BROKEN_CHAIN: grpc.StatusCode.FAILED_PRECONDITION,
    Problem.CANCELLED: grpc.StatusCode.CANCELLED,
    Problem.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
}


def reply_of(operation: str, operation_id: int, result: Result) -> pb.AttachReply:
    """The reply to `operation` (the name of its field in AttachOperation; "" when it does not matter)."""
    reply = pb.AttachReply(operation_id=operation_id)
    if isinstance(result, Granted):
        reply.granted.lease_id = result.lease_id
        reply.granted.slots.extend(result.slots)
        reply.granted.cached_tokens = result.cached_tokens
        reply.granted.pulling = result.pulling
    elif isinstance(result, Added):
        reply.extended.slots.extend(result.slots)
    elif isinstance(result, Changed):
        changes = [pb.SlotChange(block=block, slot=slot) for block, slot in result.changes]
        if operation == "refresh":
            reply.refreshed.cached_tokens = result.cached_tokens
            reply.refreshed.changes.extend(changes)
        else:
            reply.sealed.changes.extend(changes)
            reply.sealed.SetInParent()
    elif isinstance(result, Refused):
        reply.failure.code = CODES[result.problem].value[0]
        reply.failure.message = result.message
        reply.failure.retryable = result.retryable
    else:
        reply.done.SetInParent()
    return reply
