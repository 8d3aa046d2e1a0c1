"""Matchers of constrained sequences, made in a thread of their own before the sequences may run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc

from headway.core.model import ModelCard
from headway.core.sampling import ConstraintError
from headway.core.sequence import Sequence
from headway.engine.contract import Matcher
from headway.text.constrain import Grammars, LibraryMissing
from headway.text.errors import TextError
from headway.v1 import common_pb2
from headway.worker.convert import failure

log = logging.getLogger(__name__)


class Matchers:
    """`unable`: why no answer can be constrained here; empty where some can."""

    def __init__(self, card: ModelCard) -> None:
        """Reads the model's tokenizer, where the library is installed: see Grammars."""
        self.unable = ""
        self._grammars: Grammars | None = None
        self._thread = ThreadPoolExecutor(1, "grammar")
        try:
            self._grammars = Grammars(card.tokenizer_path, card.vocab_size, card.eos_token_ids)
        except (TextError, OSError) as error:
            self.unable = str(error)
            if not isinstance(error, LibraryMissing):
                log.warning("event=no_constraints reason=%s", error)

    def make(self, sequence: Sequence, done: Callable[[Matcher | common_pb2.Failure], None]) -> None:
        """Calls `done` later, on the event loop, with the matcher or with what to tell the sequence's router."""
        loop = asyncio.get_running_loop()
        outputs = sequence.tokens[sequence.prompt_tokens :]
        loop.run_in_executor(self._thread, self._make, sequence, outputs).add_done_callback(
            lambda made: None if made.cancelled() else done(made.result())
        )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _make(self, sequence: Sequence, outputs: list[int]) -> Matcher | common_pb2.Failure:
        constraint = sequence.sampling.constraint
        assert constraint is not None
        if self._grammars is None:
            return failure(grpc.StatusCode.FAILED_PRECONDITION, self.unable, retryable=False)
        try:
            return self._grammars.matcher(constraint, outputs, sequence.stop_token_ids)
        except ConstraintError as error:
            return failure(grpc.StatusCode.INVALID_ARGUMENT, f"constraint: {error}", retryable=False)
        except Exception as error:  # whatever the library makes of a text; only this sequence ends of it
            return failure(grpc.StatusCode.INTERNAL, f"the constraint could not be compiled: {error}", retryable=False)
