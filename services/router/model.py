"""The model that the fleet serves, as its workers announced it."""

from __future__ import annotations

import asyncio

import grpc

from headway.core.lengths import AnswerLengths
from headway.core.model import ModelCard
from headway.runtime.errors import HeadwayError
from headway.text.errors import TextError
from headway.text.tokenizer import Tokenizer, load_tokenizer


class ServedModel:
    """A card with what is derived from it once. The tokenizer loads in a thread, from the moment of announcement."""

    def __init__(self, card: ModelCard) -> None:
        self.card = card
        self.name = card.name
        self.block_size = card.kv_format.block_size
        self.format_digest = card.kv_format.digest()
        self.lengths = AnswerLengths()
        self._loading = asyncio.create_task(asyncio.to_thread(load_tokenizer, card.tokenizer_path))
        # A failure is told to whoever asks for the tokenizer; nobody may.
        self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def tokenizer(self) -> Tokenizer:
        """Raises HeadwayError FAILED_PRECONDITION when the tokenizer's files cannot be used."""
        if self._loading.done() and not self._loading.cancelled() and self._loading.exception() is None:
            return self._loading.result()
        try:
            return await asyncio.shield(self._loading)
        except (TextError, OSError) as error:
            message = f"the router cannot load the tokenizer of {self.name}: {error}"
            raise HeadwayError(grpc.StatusCode.FAILED_PRECONDITION, message) from None

    def same(self, card: ModelCard) -> bool:
        """Whether a worker with this card may share blocks and requests with those before it."""
        ours = self.card
        return (ours.name, ours.fingerprint, ours.kv_format) == (card.name, card.fingerprint, card.kv_format)

    def close(self) -> None:
        self._loading.cancel()
