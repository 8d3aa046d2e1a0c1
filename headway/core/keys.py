"""Block keys: blake2b chained over (parent key, token ids), keyed by a namespace."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

KEY_BYTES = 16
ROOT = b""


def key_namespace(fingerprint: bytes, kv_format_digest: bytes, tenant: str, salt: str) -> bytes:
    """32 bytes that keep apart the blocks of different models, KV formats, tenants and cache salts."""
    digest = hashlib.blake2b(digest_size=32)
    for part in (fingerprint, kv_format_digest, tenant.encode(), salt.encode()):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def block_keys(namespace: bytes, token_ids: Sequence[int], block_size: int, parent: bytes = ROOT) -> list[bytes]:
    """One 16-byte key for each full block of `token_ids`, chained from `parent` (ROOT at the start of a sequence)."""
    packed = array("I", token_ids).tobytes()
    step = block_size * 4
    # A copy of a hash that has its key takes 0.6 of what a new one takes.
    keyed = hashlib.blake2b(digest_size=KEY_BYTES, key=namespace)
    keys: list[bytes] = []
    for start in range(0, len(packed) - step + 1, step):
        block = keyed.copy()
        block.update(parent + packed[start : start + step])
        parent = block.digest()
        keys.append(parent)
    return keys


def join_keys(keys: Sequence[bytes]) -> bytes:
    """Keys one after the other, as messages carry them."""
    return b"".join(keys)


def split_keys(joined: bytes) -> list[bytes]:
    """The inverse of join_keys; ValueError unless the length is a multiple of 16."""
    if len(joined) % KEY_BYTES:
        raise ValueError(f"block keys are {KEY_BYTES} bytes each; got {len(joined)} bytes")
    return [joined[at : at + KEY_BYTES] for at in range(0, len(joined), KEY_BYTES)]


def common_blocks(keys: Sequence[bytes], other: Sequence[bytes]) -> int:
    """Equal leading keys, at least one: chained keys that are equal at one place are equal before it."""
    low, high = 1, min(len(keys), len(other))
    if keys[high - 1] == other[high - 1]:
        return high
    while low < high:
        middle = (low + high) // 2
        if keys[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low
