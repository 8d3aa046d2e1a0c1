"""Token ids to text, one at a time: never half a character, and joined the same text as decoding all at once.

Three kinds, chosen by the decoder that tokenizer.json names:

- bytes: every token is some bytes whatever its neighbours are (byte-level BPE); an incremental UTF-8 decoder joins them
- byte fallback: tokens are text except for `<0xE2>`, which are single bytes (sentencepiece BPE)
- text: the tokens' text depends at most on whether they come first (WordPiece, Metaspace); the tokenizer itself says
  what a token adds after the one before it
"""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import Protocol

REPLACEMENT = "\ufffd"

# A character's UTF-8 has at most 4 bytes, so that no more tokens than this wait for its end.
MAX_HELD_TOKENS = 4
MAX_CONTEXT_TOKENS = 16


class Detokenizer(Protocol):
    """Text of one sequence as it grows. `push` gives what became final; `flush`, once, what was left."""

    def push(self, token_id: int) -> str: ...

    def flush(self) -> str: ...


class BytesDetokenizer:
    """`token_bytes(id)` gives a token's bytes; invalid UTF-8 becomes U+FFFD once per maximal subpart (Unicode 3.9)."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(self._token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteFallbackDetokenizer:
    """`token_piece(id)` gives a token's text, or its one byte. `strip` spaces are dropped at the very start.

    From the first invalid byte on, each byte of a run of byte tokens becomes one U+FFFD, as decoding all at once gives
    it. (All at once, characters before that byte in the same run are lost too; here they have been sent by then.)
    """

    def __init__(self, token_piece: Callable[[int], str | bytes], strip: int) -> None:
        self._token_piece = token_piece
        self._strip = strip
        self._held = b""
        self._broken = False

    def push(self, token_id: int) -> str:
        piece = self._token_piece(token_id)
        if isinstance(piece, bytes):
            return self._trim(self._byte(piece))
        if not piece:
            return ""
        text = self.flush() + piece
        self._broken = False
        return self._trim(text)

    def flush(self) -> str:
        text, self._held = REPLACEMENT * len(self._held), b""
        return text

    def _byte(self, byte: bytes) -> str:
        self._held += byte
        if self._broken:
            return self.flush()
        try:
            text = self._held.decode()
        except UnicodeDecodeError as error:
            if error.end == len(self._held) and error.reason == "unexpected end of data":
                return ""
            self._broken = True
            return self.flush()
        self._held = b""
        return text

    def _trim(self, text: str) -> str:
        while self._strip and text:
            if text[0] != " ":
                self._strip = 0
                break
            text, self._strip = text[1:], self._strip - 1
        return text


class TextDetokenizer:
    """`decode(ids)` decodes a few tokens; a token's text is what it adds to that of the one before it.

    States: `_context` are tokens whose text is out (the last one that had any; at the start, all so far), `_held` are
    those whose text still ends with a broken character.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._held: list[int] = []
        self._started = False

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text = self._added()
        if text.endswith(REPLACEMENT) and len(self._held) < MAX_HELD_TOKENS:
            return ""
        return self._release(text)

    def flush(self) -> str:
        return self._release(self._added()) if self._held else ""

    def _added(self) -> str:
        before = self._decode(self._context) if self._context else ""
        return self._decode(self._context + self._held)[len(before) :]

    def _release(self, text: str) -> str:
        if text:
            self._context, self._started = self._held, True
        elif not self._started:
            self._context = (self._context + self._held)[:MAX_CONTEXT_TOKENS]
        self._held = []
        return text
