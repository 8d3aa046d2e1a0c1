"""Run messages to and from the core's sequences."""

from __future__ import annotations

import grpc

from headway.core.keys import split_keys
from headway.core.model import ModelCard
from headway.core.sequence import Finish, Sequence
from headway.engine.contract import Drawn
from headway.runtime.convert import greatest_id, ids_from_bytes, sampling_from_proto
from headway.v1 import common_pb2, decode_pb2, kvstore_pb2, prefill_pb2

FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    Finish.STOP: common_pb2.FINISH_REASON_STOP,
    Finish.LENGTH: common_pb2.FINISH_REASON_LENGTH,
}


class Pieces:
    """Puts together sequences whose prompts came in several messages (`Sequence.more`)."""

    def __init__(self) -> None:
        self._open: dict[tuple[str, int], common_pb2.Sequence] = {}

    def add(self, piece: common_pb2.Sequence) -> common_pb2.Sequence | None:
        """The whole sequence once its last piece is here."""
        key = (piece.sequence_id, piece.attempt)
        whole = self._open.get(key)
        if whole is None and not piece.more:
            return piece
        if whole is None:
            whole = self._open[key] = common_pb2.Sequence()
            whole.CopyFrom(piece)
        else:
            whole.tokens += piece.tokens
        if piece.more:
            return None
        return self._open.pop(key)

    def drop(self, sequence_id: str, attempt: int) -> None:
        self._open.pop((sequence_id, attempt), None)


def sequence_from_proto(message: common_pb2.Sequence, card: ModelCard) -> Sequence:
    """Raises ValueError where the message cannot be run with this model."""
    packed = ids_from_bytes(message.tokens)
    tokens = packed.tolist()
    if not tokens or len(tokens) >= card.context_tokens:
        raise ValueError(f"sequence has {len(tokens)} tokens; it needs 1 to {card.context_tokens - 1}")
    if (greatest := greatest_id(packed)) >= card.vocab_size:
        raise ValueError(f"token id {greatest} is outside the vocabulary of {card.vocab_size}")
    if not 0 < message.prompt_tokens <= len(tokens):
        raise ValueError(f"prompt_tokens is {message.prompt_tokens} of {len(tokens)} tokens")
    keys = split_keys(message.block_keys)
    return Sequence(
        sequence_id=message.sequence_id,
        attempt=message.attempt,
        tokens=tokens,
        prompt_tokens=message.prompt_tokens,
        namespace=message.key_namespace,
        keys=keys[: len(tokens) // card.kv_format.block_size],
        sampling=sampling_from_proto(message.sampling),
        max_tokens=max(1, message.max_tokens),
        stop_token_ids=frozenset(message.stop_token_ids),
        arrival_s=message.arrival_s,
        block_size=card.kv_format.block_size,
        context_tokens=card.context_tokens,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
        priority=message.priority,
        choice=message.choice,
        tenant=message.tenant,
        expected_tokens=message.expected_tokens,
        first_token_due_s=message.first_token_due_s if message.HasField("first_token_due_s") else None,
        deadline_s=message.deadline_s if message.HasField("deadline_s") else None,
        given=len(tokens),
    )


def token_to_proto(drawn: Drawn, output_index: int) -> common_pb2.Token:
    token = common_pb2.Token(token_id=drawn.token_id, output_index=output_index)
    if drawn.logprob is not None:
        token.logprob = drawn.logprob
        for token_id, logprob in drawn.top_logprobs:
            token.top_logprobs.add(token_id=token_id, logprob=logprob)
    return token


def failure(code: grpc.StatusCode, message: str, *, retryable: bool) -> common_pb2.Failure:
    return common_pb2.Failure(code=code.value[0], message=message, retryable=retryable)


def pull_from_proto(start: prefill_pb2.PrefillStart | decode_pb2.DecodeStart) -> kvstore_pb2.PullBlocks | None:
    """What the kvstore is to fetch first."""
    if not start.pull.blocks:
        return None
    return kvstore_pb2.PullBlocks(kvstore=start.pull.kvstore, blocks=start.pull.blocks)
