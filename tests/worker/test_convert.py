"""What a router's messages become at a worker, and which of them cannot be run."""

from __future__ import annotations

import pytest

from headway.core.keys import block_keys, join_keys
from headway.engine.simulated import simulated_card
from headway.runtime.convert import ids_to_bytes
from headway.v1 import common_pb2
from headway.worker.convert import Pieces, sequence_from_proto

CARD = simulated_card()


def message(tokens: bytes, prompt_tokens: int = 3, **fields: bool) -> common_pb2.Sequence:
    return common_pb2.Sequence(sequence_id="s", tokens=tokens, prompt_tokens=prompt_tokens, **fields)


def test_a_prompt_in_pieces_is_one_sequence() -> None:
    prompt = [at % CARD.vocab_size for at in range(1000)]
    pieces, parts = Pieces(), [ids_to_bytes(prompt[start : start + 300]) for start in range(0, 1000, 300)]
    first = message(parts[0], 1000, more=True)
    first.block_keys = join_keys(block_keys(b"n", prompt, CARD.kv_format.block_size))
    assert pieces.add(first) is None
    assert pieces.add(message(parts[1], more=True)) is None
    assert pieces.add(message(parts[2], more=True)) is None
    whole = pieces.add(message(parts[3]))
    assert whole is not None
    sequence = sequence_from_proto(whole, CARD)
    assert sequence.tokens == prompt
    assert sequence.prompt_tokens == sequence.given == 1000
    assert len(sequence.keys) == 1000 // CARD.kv_format.block_size
    # Nothing of it is left.
    assert pieces.add(message(parts[0])) is not None


@pytest.mark.parametrize(
    ("tokens", "prompt_tokens", "sentence"),
    [
        (b"", 0, "sequence has 0 tokens"),
        (ids_to_bytes([1, 2, 3])[:-1], 3, "token ids are 4 bytes each; got 11 bytes"),
        (ids_to_bytes([1, CARD.vocab_size, 3]), 3, f"token id {CARD.vocab_size} is outside the vocabulary"),
        (ids_to_bytes([1, (1 << 32) - 1, 3]), 3, f"token id {(1 << 32) - 1} is outside the vocabulary"),
        (ids_to_bytes([1, 2, 3]), 4, "prompt_tokens is 4 of 3 tokens"),
        (ids_to_bytes([1, 2, 3]), 0, "prompt_tokens is 0 of 3 tokens"),
        (ids_to_bytes([1] * CARD.context_tokens), 3, "it needs 1 to"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_sentence(tokens: bytes, prompt_tokens: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        sequence_from_proto(message(tokens, prompt_tokens), CARD)
