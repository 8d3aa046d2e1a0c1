"""The incremental detokenizer gives what decoding all at once gives, and never half a character."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from headway.text.detokenize import REPLACEMENT, Detokenizer, TextDetokenizer
from headway.text.pieces import detokenizer_factory
from headway.text.tokenizer import ByteTokenizer
from tests.text import models

LLAMA, GEMMA = models.sentencepiece(), models.sentencepiece(strip=False)
ALL = [models.byte_level(), LLAMA, GEMMA, models.unigram(), models.wordpiece()]
NAMES = ["byte_level", "llama", "gemma", "unigram", "wordpiece"]


def factory(tokenizer: Tokenizer) -> Callable[[], Detokenizer]:
    decoder: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"]
    return detokenizer_factory(tokenizer, decoder)


def joined(detokenizer: Detokenizer, ids: list[int]) -> str:
    return "".join([*(detokenizer.push(token_id) for token_id in ids), detokenizer.flush()])


def mixed_run(tokenizer: Tokenizer, ids: list[int]) -> bool:
    """Whether a run of byte tokens has both characters and broken bytes: an incremental decoder cannot know in time."""
    run = b""
    tokens = [tokenizer.id_to_token(token_id) for token_id in ids]
    for token in [*(token for token in tokens if token not in (None, "<s>", "</s>")), "end"]:
        if token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
            continue
        text = run.decode(errors="replace")
        if REPLACEMENT in text and text.strip(REPLACEMENT):
            return True
        run = b""
    return False


@pytest.mark.parametrize("tokenizer", ALL, ids=NAMES)
def test_joined_output_equals_full_decode(tokenizer: Tokenizer) -> None:
    new = factory(tokenizer)

    @given(st.lists(st.integers(0, tokenizer.get_vocab_size() + 3), max_size=30))
    def check(ids: list[int]) -> None:
        if not mixed_run(tokenizer, ids):
            assert joined(new(), ids) == tokenizer.decode(ids, skip_special_tokens=True)

    check()


@pytest.mark.parametrize("tokenizer", ALL[:3], ids=NAMES[:3])
def test_text_comes_out_as_it_went_in_and_without_half_characters(tokenizer: Tokenizer) -> None:
    new = factory(tokenizer)

    @given(st.text(alphabet="ab é東京😀\n", min_size=1, max_size=20))
    def check(text: str) -> None:
        detokenizer = new()
        pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode(text).ids]
        assert detokenizer.flush() == ""
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text).ids)
        assert not any(REPLACEMENT in piece for piece in pieces)

    check()


@pytest.mark.parametrize("tokenizer", ALL[:3], ids=NAMES[:3])
def test_characters_of_several_tokens_come_out_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a😀b").ids
    pieces = [piece for detokenizer in [factory(tokenizer)()] for piece in map(detokenizer.push, ids) if piece]
    assert "😀" in [piece.strip() for piece in pieces]
    assert len(ids) > len(pieces)


def test_a_broken_run_of_bytes_is_one_replacement_a_byte_and_held_at_most_for_a_character() -> None:
    detokenizer = factory(LLAMA)()
    ids = [LLAMA.token_to_id(token) for token in ["a", "<0xF0>", "<0x9F>", "b", "<0xFF>", "<0x41>", "a", "<0x41>"]]
    pieces = [detokenizer.push(token_id) for token_id in ids]
    assert pieces == ["a", "", "", "\ufffd\ufffdb", "\ufffd", "\ufffd", "a", "A"]


def test_an_endless_invalid_sequence_is_neither_held_nor_rescanned() -> None:
    lengths: list[int] = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return REPLACEMENT * len(ids)

    assert joined(TextDetokenizer(decode), [7] * 1000) == REPLACEMENT * 1000
    assert max(lengths) <= 8


def test_an_unfinished_character_is_one_replacement_at_the_end() -> None:
    tokenizer = ALL[0]
    ids = tokenizer.encode("a😀").ids[:-1]
    detokenizer = factory(tokenizer)()
    assert "".join(map(detokenizer.push, ids)) == "a"
    assert detokenizer.flush() == REPLACEMENT


@given(st.binary(max_size=20))
def test_bytes_detokenizer_equals_decode(data: bytes) -> None:
    tokenizer = ByteTokenizer()
    assert joined(tokenizer.detokenizer(), list(data)) == tokenizer.decode(data) == data.decode(errors="replace")


def test_unusual_decoders_fall_back_to_asking_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = models.byte_level()
    assert isinstance(detokenizer_factory(tokenizer, None)(), TextDetokenizer)
    ids = tokenizer.encode("the café 😀 東京").ids
    assert joined(detokenizer_factory(tokenizer, None)(), ids) == "the café 😀 東京"
