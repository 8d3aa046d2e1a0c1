"""Tokenizers: text and chats to token ids and back, from the tokenizer.json of a model folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from headway.text.chat import ChatTemplate, bos_token, load_chat_template
from headway.text.detokenize import Detokenizer
from headway.text.errors import TextError
from headway.text.pieces import BytePieces, detokenizer_factory

__all__ = ["ByteTokenizer", "TextError", "Tokenizer", "load_tokenizer"]


class Tokenizer(Protocol):
    """What the router needs. `encode` and `encode_chat` raise TextError; special tokens have no text."""

    def encode(self, text: str) -> list[int]: ...

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]: ...

    def detokenizer(self) -> Detokenizer: ...

    def decode(self, ids: Iterable[int]) -> str: ...


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of the model folder `path`; "" gives the byte tokenizer. Raises TextError."""
    return ModelTokenizer(Path(path)) if path else ByteTokenizer()


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 text, others have no text: for simulated engines."""

    def __init__(self) -> None:
        self._pieces = BytePieces.identity()

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        lines = [f"{role}: {content}\n" for role, content in _some(messages)]
        return self.encode("".join(lines) + "assistant: ")

    def detokenizer(self) -> Detokenizer:
        return self._pieces.detokenizer()

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token_id for token_id in ids if token_id < 256).decode(errors="replace")


class ModelTokenizer:
    """The tokenizer and chat template of a model folder."""

    def __init__(self, folder: Path) -> None:
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise TextError(f"{folder} has no tokenizer.json; give a model folder in Hugging Face format")
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(file))
            decoder = json.loads(file.read_text(encoding="utf-8")).get("decoder")
        except Exception as error:  # tokenizers raises bare Exception
            raise TextError(f"{file} cannot be read as a tokenizer: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._folder = folder
        self._template: ChatTemplate | None = load_chat_template(folder)
        bos = bos_token(folder)
        self._bos_id: int | None = None if bos is None else self._tokenizer.token_to_id(bos)
        self._new_detokenizer = detokenizer_factory(self._tokenizer, decoder)

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model wants around a text; no second BOS if the text has one."""
        ids = self._encode(text, add_special_tokens=True)
        if self._bos_id is not None and ids[:2] == [self._bos_id, self._bos_id]:
            del ids[0]
        return ids

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of the rendered chat; special tokens are those that the template writes."""
        if self._template is None:
            raise TextError(f"the model in {self._folder} has no chat template; send text or token ids instead")
        return self._encode(self._template.render(_some(messages)), add_special_tokens=False)

    def detokenizer(self) -> Detokenizer:
        return self._new_detokenizer()

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        _utf8(text)
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except Exception as error:  # tokenizers raises bare Exception, e.g. for a word outside a vocabulary without UNK
            raise TextError(f"the text cannot be tokenized: {error}") from None


def _some(messages: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    if not messages:
        raise TextError("the chat has no messages; give at least one")
    return messages


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise TextError(f"the text is not valid Unicode: {error}") from None
