"""One answer as it grows: tokens in order, their text, stop strings, and the messages that the client gets."""

from __future__ import annotations

import time

from headway.text.stop import StopStrings
from headway.v1 import common_pb2, router_pb2
from services.router.job import Job


class Answer:
    """Takes tokens of whichever worker serves; gives the client's messages.

    Only the next output index is ever taken. `reason` is set once the answer is over; nothing is taken after that.
    """

    def __init__(self, job: Job, choice: int) -> None:
        self._job = job
        self._choice = choice
        self._detokenizer = job.tokenizer.detokenizer()
        self._stops = StopStrings(job.request.stop_strings) if job.request.stop_strings else None
        self.sent: list[int] = []
        self._tokens: list[common_pb2.Token] = []
        self._text: list[str] = []
        self.reason: common_pb2.FinishReason.ValueType = common_pb2.FINISH_REASON_UNSPECIFIED
        self.finished = router_pb2.Finished()
        self.finished.usage.prompt_tokens = len(job.token_ids)

    @property
    def over(self) -> bool:
        return self.reason != common_pb2.FINISH_REASON_UNSPECIFIED

    def take(self, token: common_pb2.Token, reason: common_pb2.FinishReason.ValueType) -> bool:
        """The next token; `reason` is set if the worker ended the answer with it. False if one before it is missing.

        A token that was taken before is ignored.
        """
        due = len(self.sent)
        if token.output_index != due or self.over:
            return token.output_index < due or self.over
        self.sent.append(token.token_id)
        self._tokens.append(token)
        if reason == common_pb2.FINISH_REASON_STOP and token.token_id in self._job.stop_token_ids:
            # The stop token itself is no part of the text.
            self.finished.stop_token_id = token.token_id
        else:
            self._add_text(self._detokenizer.push(token.token_id))
        if reason and not self.over:
            self._add_text(self._detokenizer.flush())
            if not self.over:
                self.reason = reason
                self._text.append(self._stops.flush() if self._stops else "")
        return True

    def saw_cache(self, cached_tokens: int, computed_tokens: int) -> None:
        """Of the prompt; only what is said with the first token counts, as replays find more."""
        if not self.sent:
            self.finished.usage.cached_tokens = cached_tokens
            self.finished.usage.computed_tokens = computed_tokens

    def message(self) -> router_pb2.GenerateResponse | None:
        """What to send now: a Delta with all new tokens, with Finished once it is over; None when there is nothing."""
        if not self._tokens:
            return None
        if not self.finished.timings.ttft_s:
            self.finished.timings.ttft_s = time.monotonic() - self._job.received
        delta = router_pb2.Delta(text="".join(self._text), tokens=self._tokens)
        self._tokens, self._text = [], []
        finished = self._finish() if self.over else None
        return router_pb2.GenerateResponse(choice=self._choice, delta=delta, finished=finished)

    def _finish(self) -> router_pb2.Finished:
        finished = self.finished
        self._job.model.lengths.observe(self._job.route, len(self.sent))
        finished.reason = self.reason
        finished.usage.output_tokens = len(self.sent)
        finished.timings.route_s = self._job.route_s
        finished.timings.total_s = time.monotonic() - self._job.received
        return finished

    def _add_text(self, text: str) -> None:
        if self._stops is None:
            self._text.append(text)
            return
        result = self._stops.push(text)
        self._text.append(result.text)
        if result.matched is not None:
            self.reason = common_pb2.FINISH_REASON_STOP
            self.finished.stop_string = result.matched
            self.finished.ClearField("stop_token_id")
