"""The operations on leases that a worker sends, one function each."""

from __future__ import annotations

from headway.core.keys import join_keys
from headway.core.sequence import Sequence
from headway.v1 import kvstore_pb2 as pb

Operation = pb.AttachOperation


def acquire(
    sequence: Sequence,
    joiner: str,
    growth_tokens: int,
    timeout_s: float,
    pull: pb.PullBlocks | None,
    prefill_token_s: float,
) -> Operation:
    left = sequence.max_tokens - sequence.output_index
    return Operation(
        acquire=pb.AcquireLease(
            sequence_id=sequence.sequence_id,
            attempt=sequence.attempt,
            block_keys=join_keys(sequence.keys),
            tokens=len(sequence.tokens),
            growth_tokens=max(1, min(growth_tokens, left, sequence.context_tokens - len(sequence.tokens))),
            arrival_s=sequence.arrival_s,
            joiner=joiner,
            timeout_s=timeout_s,
            pull=pull,
            prefill_token_s=prefill_token_s,
        )
    )


def cancel_acquire(sequence: Sequence) -> Operation:
    return Operation(cancel_acquire=pb.CancelAcquire(sequence_id=sequence.sequence_id, attempt=sequence.attempt))


def refresh(lease_id: int, from_token: int) -> Operation:
    return Operation(refresh=pb.RefreshLease(lease_id=lease_id, from_token=from_token))


def seal(lease_id: int, first_block: int, keys: list[bytes], parent: bytes) -> Operation:
    return Operation(
        seal=pb.SealBlocks(lease_id=lease_id, first_block=first_block, block_keys=join_keys(keys), parent_key=parent)
    )


def join(lease_id: int, epoch: int) -> Operation:
    return Operation(join=pb.JoinLease(lease_id=lease_id, epoch=epoch))


def hand_off(lease_id: int) -> Operation:
    return Operation(hand_off=pb.HandOffLease(lease_id=lease_id))


def offer(lease_id: int) -> Operation:
    return Operation(offer=pb.OfferLease(lease_id=lease_id))


def finish_pull(lease_id: int) -> Operation:
    return Operation(finish_pull=pb.FinishPull(lease_id=lease_id))


def extend(lease_id: int, blocks: int, timeout_s: float) -> Operation:
    return Operation(extend=pb.ExtendLease(lease_id=lease_id, blocks=blocks, timeout_s=timeout_s))


def renew() -> Operation:
    return Operation(renew=pb.RenewLeases())


def release(lease_id: int) -> Operation:
    return Operation(release=pb.ReleaseLease(lease_id=lease_id))
