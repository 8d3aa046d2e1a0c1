"""One choice of a request at work: which workers serve it, and what happens when one of them fails.

placed ──start──▶ at prefill ──FirstToken──▶ at decode ──finish──▶ over
  ▲  (or: decode worker by itself, from the start)  │
  └────── parked ◀── a worker is gone or fails ─────┘
"""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import replace
from typing import Any

import grpc

from headway.core.ask import Ask, Option
from headway.core.filters import check_hints
from headway.runtime.errors import HeadwayError, invalid, status_code
from headway.v1 import common_pb2, decode_pb2, prefill_pb2
from services.router.answer import Answer
from services.router.attempt import Attempt
from services.router.config import RouterConfig
from services.router.fleet import Fleet, Worker
from services.router.inbox import GONE, Inbox
from services.router.job import Job
from services.router.refuse import check_hopeless, nobody

MAX_DEATHS = 2
MAX_RETRIES = 3
BACKOFF_S = 0.05
ABORTED = grpc.StatusCode.ABORTED.value[0]
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE.value[0]


class Choice:
    """Events in (`handle`), commands to workers out; `answer` collects the tokens. All raise HeadwayError."""

    def __init__(self, job: Job, index: int, fleet: Fleet, config: RouterConfig, inbox: Inbox) -> None:
        self.job = job
        self.inbox = inbox
        self.answer = Answer(job, index)
        self._index = index
        self._fleet = fleet
        self._config = config
        self._sequence_id = os.urandom(16).hex()
        self._attempts = 0
        # None while parked, and before the start.
        self._attempt: Attempt | None = None
        self._excluded: frozenset[str] = frozenset()
        self._dead: list[str] = []
        self._retries = 0
        self._parked = False
        self._not_before = 0.0
        self._give_up_at = 0.0
        # Wakes the request when its first token is due.
        self._alarm: asyncio.TimerHandle | None = None

    # ------------------------------------------------------------------ placing

    def start(self) -> None:
        """Send the sequence to its workers, or park it until somebody can take it."""
        ask, option = self._place()
        if self._due_s is not None and self._alarm is None:
            after_s = max(0.0, self._due_s - time.monotonic())
            self._alarm = self.inbox.poke_after(after_s)
        if option is not None:
            self._unpark()
            self._dispatch(ask, option)
            return
        options = self._fleet.placer.options(ask, time.monotonic(), None)
        check_hopeless(options)
        if not self._parked:
            self._park()
        elif time.monotonic() >= self._give_up_at:
            raise nobody(options)

    def resume(self) -> None:
        """Try again to place a parked choice; refuse one whose first token is due."""
        due_s = self._due_s
        if due_s is not None and time.monotonic() >= due_s:
            message = f"no first token came within {self.job.request.ttft_objective_s:g} s; try again later"
            raise HeadwayError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, retry_after_s=1.0)
        if self._parked and time.monotonic() >= self._not_before:
            self.start()

    def options(self) -> list[Option]:
        """Where this choice could go now, best first. Raises HeadwayError when a hint cannot be followed."""
        ask, picked = self._place()
        return self._fleet.placer.options(ask, time.monotonic(), picked)

    @property
    def _due_s(self) -> float | None:
        """When the first token is due. The other choices of a request, and replays, come after it."""
        return None if self._index or self.answer.sent else self.job.due

    def _place(self) -> tuple[Ask, Option | None]:
        """Workers that failed it are left out while there are others."""
        placer, now_s = self._fleet.placer, time.monotonic()
        # The client's hints are for the first attempt: later ones run wherever they can.
        ask = self.job.ask(placer, self._due_s, self._excluded, hinted=self._attempts == 0)
        try:
            check_hints(ask, placer.loads)
        except ValueError as error:
            raise invalid(str(error)) from None
        option = placer.place(ask, now_s)
        if option is None and self._excluded:
            ask = replace(ask, excluded=frozenset())
            option = placer.place(ask, now_s)
        return ask, option

    def close(self) -> None:
        """The end: no worker keeps anything of this choice."""
        self._unpark()
        if self._alarm is not None:
            self._alarm.cancel()
        if self._attempt is not None:
            self._attempt.end()

    def _dispatch(self, ask: Ask, option: Option) -> None:
        workers = self._fleet.workers
        prefill = workers[option.prefill_worker] if option.prefill_worker else None
        reservation = self._fleet.placer.reserve(self._sequence_id, ask, option, time.monotonic())
        number = self._attempts
        decode = workers[option.decode_worker]
        pull = None
        if option.pull_from is not None:
            blocks = option.overlap_tokens // self.job.model.block_size
            pull = common_pb2.PullHint(kvstore=option.pull_from, blocks=blocks)
        self._attempt = Attempt(self, self._sequence_id, number, prefill, decode, reservation, pull)
        self._attempts += 1
        self._attempt.dispatch(self.job.sequence(self._sequence_id, number, self._index, self.answer.sent))

    def _end_attempt(self) -> None:
        if self._attempt is not None:
            self._attempt.end()
            self._attempt = None

    def _park(self) -> None:
        """Wait for a worker; the inbox is poked when one reports, and when it is time to give up."""
        seconds = self._config.no_worker_timeout_s
        self._parked = True
        self._give_up_at = time.monotonic() + seconds
        self._fleet.waiting.add(self.inbox)
        self.inbox.poke_after(seconds)

    def _unpark(self) -> None:
        if self._parked:
            self._parked = False
            self._fleet.waiting.discard(self.inbox)

    # ------------------------------------------------------------------ events

    def handle(self, worker: Worker, event: Any) -> None:
        """An event of a worker; those of older attempts, or after the end, are dropped."""
        attempt = self._attempt
        if attempt is None or self.answer.over or worker not in (attempt.prefill, attempt.decode):
            return
        if event is GONE:
            self._gone(attempt, worker)
        elif event.attempt == attempt.number:
            kind = event.WhichOneof("event")
            if kind == "tokens":
                self._tokens(attempt, event.tokens)
            elif kind == "first_token":
                self._first_token(attempt, event.first_token)
            elif kind == "failure":
                attempt.release(worker)
                self._failed(worker, event.failure)

    def _first_token(self, attempt: Attempt, first: prefill_pb2.FirstToken) -> None:
        """Prefill is done: the decode worker may go on; the client gets the token without waiting for that."""
        if attempt.begun or attempt.prefill is None:
            return
        attempt.computed()
        self.answer.saw_cache(first.cached_tokens, first.computed_tokens)
        self.answer.finished.timings.MergeFrom(first.timings)
        self.answer.finished.usage.pulled_bytes += first.pulled_bytes
        if not self._take(attempt, first.token, first.finish_reason):
            return
        attempt.begun = True
        if first.finish_reason:
            attempt.release(attempt.prefill)
        if not self.answer.over:
            attempt.begin(first)

    def _tokens(self, attempt: Attempt, tokens: decode_pb2.DecodeTokens) -> None:
        """A step's tokens."""
        attempt.decoding()
        finished = self.answer.finished
        if tokens.HasField("timings"):
            finished.timings.MergeFrom(tokens.timings)
        if tokens.HasField("cached_tokens"):
            self.answer.saw_cache(tokens.cached_tokens, tokens.computed_tokens)
        if attempt.prefill is None:
            finished.usage.pulled_bytes += tokens.pulled_bytes
        else:
            finished.usage.handoff_bytes += tokens.pulled_bytes
        finished.usage.working_copy_bytes += tokens.working_copy_bytes
        finished.usage.drafted_tokens += tokens.drafted_tokens
        finished.usage.accepted_tokens += tokens.accepted_tokens
        last = len(tokens.tokens) - 1
        for at, token in enumerate(tokens.tokens):
            reason = tokens.finish_reason if at == last else common_pb2.FINISH_REASON_UNSPECIFIED
            if not self._take(attempt, token, reason):
                return
        if tokens.finish_reason:
            attempt.release(attempt.decode)

    def _take(self, attempt: Attempt, token: common_pb2.Token, reason: common_pb2.FinishReason.ValueType) -> bool:
        if self.answer.take(token, reason):
            if self.answer.over:
                finished = self.answer.finished
                finished.prefill_worker = attempt.prefill.worker_id if attempt.prefill else ""
                finished.decode_worker = attempt.decode.worker_id
                finished.replays = attempt.number
            return True
        worker = attempt.serving
        missing = f"worker {worker.worker_id} left out token {len(self.answer.sent)} of the answer"
        self._failed(worker, common_pb2.Failure(code=ABORTED, message=missing, retryable=True))
        return False

    # ------------------------------------------------------------------ failures

    def _gone(self, attempt: Attempt, worker: Worker) -> None:
        """The worker's stream broke. Before the first token prefill is to blame, after it decode."""
        attempt.release(worker)
        if worker is attempt.serving:
            self._dead.append(worker.worker_id)
            if len(self._dead) >= MAX_DEATHS:
                message = f"this request ended two workers ({' and '.join(self._dead)}) and is not tried again"
                raise HeadwayError(grpc.StatusCode.INTERNAL, message)
        elif worker is attempt.decode:
            self._count_retry(f"decode worker {worker.worker_id} went away", grpc.StatusCode.UNAVAILABLE)
        else:
            return
        self._excluded |= {worker.worker_id}
        self._end_attempt()
        self.start()

    def _failed(self, worker: Worker, failure: common_pb2.Failure) -> None:
        code = status_code(failure.code)
        if not failure.retryable:
            raise HeadwayError(code, failure.message)
        self._count_retry(failure.message, code)
        if failure.code == UNAVAILABLE:
            # Its next status says when it is ready again.
            worker.load.ready = False
        self._end_attempt()
        backoff_s = BACKOFF_S * self._retries
        self._not_before = time.monotonic() + backoff_s
        self.inbox.poke_after(backoff_s)
        self._park()

    def _count_retry(self, message: str, code: grpc.StatusCode) -> None:
        self._retries += 1
        if self._retries > MAX_RETRIES:
            raise HeadwayError(code, message)
