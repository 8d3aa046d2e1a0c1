"""Between proto messages and the core's own types; the only place where either is spelled out for the other."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable

import numpy as np

from headway.core.model import KvFormat, LayerGroup, ModelCard
from headway.core.sampling import Constraint, ConstraintKind, Sampling
from headway.v1 import common_pb2


def ids_to_bytes(token_ids: Iterable[int]) -> bytes:
    """As messages between router and workers carry them: 4 bytes each, little-endian."""
    return array("I", token_ids).tobytes()


def ids_from_bytes(packed: bytes) -> array[int]:
    """The inverse; ValueError unless the length is a multiple of 4."""
    if len(packed) % 4:
        raise ValueError(f"token ids are 4 bytes each; got {len(packed)} bytes")
    token_ids = array("I")
    token_ids.frombytes(packed)
    return token_ids


def greatest_id(token_ids: array[int]) -> int:
    """Of at least one; a tenth of a microsecond each would be long for a long prompt."""
    return int(np.frombuffer(token_ids, np.uint32).max())


def kv_format_to_proto(kv_format: KvFormat) -> common_pb2.KvFormat:
    message = common_pb2.KvFormat(block_size=kv_format.block_size, dtype=kv_format.dtype, order=kv_format.order)
    for group in kv_format.groups:
        message.groups.add(
            layers=group.layers,
            kv_heads=group.kv_heads,
            head_dim=group.head_dim,
            bytes_per_token=group.bytes_per_token,
            window=group.window,
            shard=group.shard,
            shards=group.shards,
        )
    return message


def kv_format_from_proto(message: common_pb2.KvFormat) -> KvFormat:
    groups = tuple(
        LayerGroup(g.layers, g.kv_heads, g.head_dim, g.bytes_per_token, g.window, g.shard, g.shards)
        for g in message.groups
    )
    return KvFormat(message.block_size, message.dtype, message.order, groups)


def card_to_proto(card: ModelCard) -> common_pb2.ModelCard:
    return common_pb2.ModelCard(
        name=card.name,
        fingerprint=card.fingerprint,
        context_tokens=card.context_tokens,
        vocab_size=card.vocab_size,
        eos_token_ids=card.eos_token_ids,
        kv_format=kv_format_to_proto(card.kv_format),
        tokenizer_path=card.tokenizer_path,
    )


def card_from_proto(message: common_pb2.ModelCard) -> ModelCard:
    return ModelCard(
        name=message.name,
        fingerprint=message.fingerprint,
        context_tokens=message.context_tokens,
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        kv_format=kv_format_from_proto(message.kv_format),
        tokenizer_path=message.tokenizer_path,
    )


def sampling_from_proto(message: common_pb2.Sampling) -> Sampling:
    """Unset fields take Sampling's defaults. Raises ValueError on a value outside its range."""
    plain = {field.name: value for field, value in message.ListFields()}
    plain.pop("logit_bias", None)
    plain.pop("bad_words", None)
    plain["constraint"] = constraint_from_proto(message.constraint) if message.HasField("constraint") else None
    bad_words = tuple(tuple(phrase.token_ids) for phrase in message.bad_words)
    return Sampling(**plain, logit_bias=dict(message.logit_bias), bad_words=bad_words)


def constraint_from_proto(message: common_pb2.Constraint) -> Constraint:
    """Raises ValueError where it says nothing."""
    match message.WhichOneof("kind"):
        case "json_schema":
            return Constraint(ConstraintKind.JSON_SCHEMA, message.json_schema)
        case "json_object":
            return Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "object"}')
        case "regex":
            return Constraint(ConstraintKind.REGEX, message.regex)
        case "choices" if all(message.choices.texts) and message.choices.texts:
            return Constraint(ConstraintKind.CHOICES, json.dumps(list(message.choices.texts)))
        case "choices":
            raise ValueError("the constraint has no choices, or one without text; give at least one, each with text")
        case _:
            raise ValueError("the constraint is empty; set one of json_schema, json_object, regex and choices")
