"""What is known of a model without loading it: its card, and how its KV bytes lie in a slot."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "uint64": 8}


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers whose KV has one shape. `bytes_per_token` covers K and V of all its layers."""

    layers: int
    kv_heads: int
    head_dim: int
    bytes_per_token: int
    window: int = 0
    shard: int = 0
    shards: int = 1


@dataclass(frozen=True, slots=True)
class KvFormat:
    """How KV bytes lie in a slot; two sides that differ in any field must not share blocks.

    `order` names the axes inside a slot, outermost first, e.g. "layer,kv,head,token,dim".
    """

    block_size: int
    dtype: str
    order: str
    groups: tuple[LayerGroup, ...]

    @property
    def slot_bytes(self) -> int:
        """Bytes in use of one slot (not page-aligned)."""
        return self.block_size * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return sum(group.bytes_per_token for group in self.groups)

    def digest(self) -> bytes:
        """16 bytes that differ whenever any field differs."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What a worker serves. `fingerprint` covers weights, quantisation, RoPE and adapter."""

    name: str
    fingerprint: bytes
    context_tokens: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    kv_format: KvFormat
    tokenizer_path: str = ""
