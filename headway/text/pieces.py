"""What each token of a tokenizer stands for, and which detokenizer its decoder calls for."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from headway.text.detokenize import ByteFallbackDetokenizer, BytesDetokenizer, Detokenizer, TextDetokenizer

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def detokenizer_factory(tokenizer: Any, decoder: dict[str, Any] | None) -> Callable[[], Detokenizer]:
    """A maker of detokenizers for a tokenizers.Tokenizer whose tokenizer.json has this `decoder`."""
    steps = _steps(decoder)
    kinds = [step["type"] for step in steps]
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return BytePieces(tokenizer.id_to_token, special).detokenizer
    if "ByteFallback" in kinds and _is_sentencepiece(steps):
        return FallbackPieces(tokenizer.id_to_token, special, steps).detokenizer
    return lambda: TextDetokenizer(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)))


class BytePieces:
    """Token id → bytes, remembered once computed. Special and unknown tokens have none."""

    def __init__(self, id_to_token: Callable[[int], str | None], special: set[int]) -> None:
        self._id_to_token = id_to_token
        self._pieces: dict[int, bytes] = dict.fromkeys(special, b"")

    @classmethod
    def identity(cls) -> BytePieces:
        """Id n is byte n."""
        pieces = cls(lambda _: None, set())
        pieces._pieces.update({byte: bytes([byte]) for byte in range(256)})
        return pieces

    def detokenizer(self) -> Detokenizer:
        return BytesDetokenizer(self._bytes)

    def _bytes(self, token_id: int) -> bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = _byte_level(self._id_to_token(token_id) or "")
        return piece


class FallbackPieces:
    """Token id → text, or one byte; what the decoder's Replace and Strip steps do, done per token."""

    def __init__(
        self, id_to_token: Callable[[int], str | None], special: set[int], steps: list[dict[str, Any]]
    ) -> None:
        self._id_to_token = id_to_token
        self._replacements = [(step["pattern"]["String"], step["content"]) for step in steps if _is(step, "Replace")]
        self._strip = sum(step["start"] for step in steps if _is(step, "Strip"))
        self._pieces: dict[int, str | bytes] = dict.fromkeys(special, "")

    def detokenizer(self) -> Detokenizer:
        return ByteFallbackDetokenizer(self._piece, self._strip)

    def _piece(self, token_id: int) -> str | bytes:
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._make(self._id_to_token(token_id) or "")
        return piece

    def _make(self, token: str) -> str | bytes:
        byte = BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes.fromhex(byte[1])
        for pattern, content in self._replacements:
            token = token.replace(pattern, content)
        return token


def _is(step: dict[str, Any], kind: str) -> bool:
    return bool(step["type"] == kind)


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]


def _is_sentencepiece(steps: list[dict[str, Any]]) -> bool:
    """Plain-text replacements before the fallback, then Fuse, then at most spaces stripped from the start."""
    kinds = [step["type"] for step in steps]
    order = "".join({"Replace": "R", "ByteFallback": "B", "Fuse": "F", "Strip": "S"}.get(kind, "?") for kind in kinds)
    if not re.fullmatch("R*B(FS?)?", order):
        return False
    plain = all("String" in step["pattern"] for step in steps if _is(step, "Replace"))
    return plain and all(step["content"] == " " and not step["stop"] for step in steps if _is(step, "Strip"))


def _bytes_of_characters() -> dict[str, int]:
    """The inverse of GPT-2's printable alphabet: printable Latin-1 is itself, other bytes are 256 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


CHARACTER_BYTES = _bytes_of_characters()


def _byte_level(token: str) -> bytes:
    """A token outside the alphabet (an added one) is its own UTF-8."""
    if all(character in CHARACTER_BYTES for character in token):
        return bytes(CHARACTER_BYTES[character] for character in token)
    return token.encode()
