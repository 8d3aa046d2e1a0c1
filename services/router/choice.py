"""One choice of a request at work: which workers serve it, and what happens when one of them fails.

placed ──start──▶ at prefill ──FirstToken──▶ at decode ──finish──▶ over
  ▲  (or: decode worker by itself, from the start)  │
  └────── parked ◀── a worker is gone or fails ─────┘
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import grpc

from headway.core.place import Option, place
from headway.runtime.errors import HeadwayError, invalid, status_code
from headway.v1 import common_pb2, decode_pb2, prefill_pb2
from services.router.answer import Answer
from services.router.config import RouterConfig
from services.router.fleet import Fleet, Worker
from services.router.inbox import GONE, Inbox
from services.router.job import Job
from services.router.refuse import check_hopeless, nobody

MAX_DEATHS = 2
MAX_RETRIES = 3
BACKOFF_S = 0.05


class Choice:
    """Events in (`handle`), commands to workers out; the answer collects the tokens. Both raise HeadwayError.

    `held` are the workers that may still hold something of the running attempt.
    """

    def __init__(self, job: Job, index: int, fleet: Fleet, config: RouterConfig, inbox: Inbox) -> None:
        self.job = job
        self.inbox = inbox
        self.answer = Answer(job, index)
        self.parked = False
        self._index = index
        self._fleet = fleet
        self._config = config
        self._sequence_id = os.urandom(16).hex()
        self._attempt = 0
        self._prefill: Worker | None = None
        self._decode: Worker | None = None
        self._begun = False
        # What the loads of workers have been told of this choice.
        self._queued_tokens = 0
        self._running: Worker | None = None
        self.held: list[Worker] = []
        self._excluded: frozenset[str] = frozenset()
        self._dead: list[str] = []
        self._retries = 0
        self._not_before = 0.0
        self._give_up_at = 0.0

    # ------------------------------------------------------------------ placing

    def start(self) -> None:
        """Send the sequence to its workers, or park it until somebody can take it."""
        options = self._options()
        if options and not options[0].refused:
            self._unpark()
            self._dispatch(options[0])
            return
        check_hopeless(options)
        if not self.parked:
            self._park(time.monotonic(), self._config.no_worker_timeout_s)
        elif time.monotonic() >= self._give_up_at:
            raise nobody(options)

    def resume(self) -> None:
        """Try again to place a parked choice."""
        if self.parked and time.monotonic() >= self._not_before:
            self.start()

    def options(self) -> list[Option]:
        """Where this choice could go now, best first. Raises HeadwayError when a hint cannot be followed."""
        return self._options()

    def _options(self) -> list[Option]:
        job = self.job
        overlap = self._fleet.overlap_tokens(job.keys, job.model.block_size)
        loads = self._fleet.loads
        try:
            options = place(job.ask(self._config, overlap, self._excluded, hinted=not self._attempt), loads)
            if self._excluded and all(option.refused for option in options):
                options = place(job.ask(self._config, overlap, frozenset(), hinted=not self._attempt), loads)
        except ValueError as error:
            raise invalid(str(error)) from None
        return options

    def _dispatch(self, option: Option) -> None:
        """One command to each worker of the option, at the same time."""
        pieces = self.job.sequence(self._sequence_id, self._attempt, self._index, self.answer.sent)
        decode = self._decode = self._fleet.workers[option.decode_worker]
        self._begun = option.prefill_worker is None
        self._queued_tokens = len(self.job.token_ids) - option.overlap_tokens
        if option.prefill_worker is None:
            self._prefill = None
            for piece in pieces:
                decode.link.send(start=decode_pb2.DecodeStart(sequence=piece))
        else:
            prefill = self._prefill = self._fleet.workers[option.prefill_worker]
            for piece in pieces:
                prefill.link.send(start=prefill_pb2.PrefillStart(sequence=piece, decode_worker=decode.worker_id))
                decode.link.send(expect=decode_pb2.DecodeExpect(sequence=piece))
            self._hold(prefill)
        self._hold(decode)
        computing = self._prefill or decode
        computing.load.queued_sequences += 1
        computing.load.queued_tokens += self._queued_tokens
        if self._prefill:
            self._count_running(decode)

    def _hold(self, worker: Worker) -> None:
        worker.link.routes[self._sequence_id] = self
        worker.load.sent += 1
        self.held.append(worker)

    def _release(self, worker: Worker) -> None:
        if worker in self.held:
            self.held.remove(worker)
            worker.link.routes.pop(self._sequence_id, None)

    def close(self) -> None:
        """Nothing is left behind: whoever may hold something of this choice is told to stop."""
        self._unpark()
        self._end_attempt()

    def _end_attempt(self) -> None:
        self._computed()
        if self._running is not None:
            self._running.load.running = max(0, self._running.load.running - 1)
            self._running = None
        for worker in list(self.held):
            worker.link.cancel(self._sequence_id, self._attempt)
            self._release(worker)

    def _count_running(self, decode: Worker) -> None:
        decode.load.running += 1
        self._running = decode

    def _computed(self) -> None:
        """The prompt does not wait any more, as far as the load of its worker is concerned."""
        worker = self._prefill or self._decode
        if worker is not None and self._queued_tokens:
            worker.load.queued_sequences = max(0, worker.load.queued_sequences - 1)
            worker.load.queued_tokens = max(0, worker.load.queued_tokens - self._queued_tokens)
            self._queued_tokens = 0

    # ------------------------------------------------------------------ events

    def handle(self, worker: Worker, event: Any) -> None:
        """An event of a worker; those of older attempts, or after the end, are dropped."""
        if self.answer.over or self.parked:
            return
        if event is GONE:
            self._gone(worker)
        elif event.attempt == self._attempt and worker in (self._prefill, self._decode):
            kind = event.WhichOneof("event")
            if kind == "tokens":
                self._tokens(worker, event.tokens)
            elif kind == "first_token":
                self._first_token(worker, event.first_token)
            elif kind == "failure":
                self._failed(worker, event.failure)

    def _first_token(self, prefill: Worker, first: prefill_pb2.FirstToken) -> None:
        """Prefill is done: the decode worker may go on; the client gets the token without waiting for that."""
        decode = self._decode
        if self._begun or decode is None:
            return
        self._computed()
        self.answer.saw_cache(first.cached_tokens, first.computed_tokens)
        self.answer.finished.timings.MergeFrom(first.timings)
        if not self._take(prefill, first.token, first.finish_reason):
            return
        self._begun = True
        if first.finish_reason:
            self._release(prefill)
        if not self.answer.over:
            decode.link.send(
                begin=decode_pb2.DecodeBegin(
                    sequence_id=self._sequence_id,
                    attempt=self._attempt,
                    lease_id=first.lease_id,
                    epoch=first.epoch,
                    first_token=first.token,
                )
            )

    def _tokens(self, decode: Worker, tokens: decode_pb2.DecodeTokens) -> None:
        """A step's tokens; the first ones say that the lease has changed hands."""
        if self._prefill is not None:
            self._release(self._prefill)
        elif self._queued_tokens:
            self._computed()
            self._count_running(decode)
        answer = self.answer
        if tokens.HasField("timings"):
            answer.finished.timings.MergeFrom(tokens.timings)
        if tokens.HasField("cached_tokens"):
            answer.saw_cache(tokens.cached_tokens, tokens.computed_tokens)
        if tokens.working_copy_bytes:
            answer.finished.usage.working_copy_bytes = tokens.working_copy_bytes
        last = len(tokens.tokens) - 1
        for at, token in enumerate(tokens.tokens):
            reason = tokens.finish_reason if at == last else common_pb2.FINISH_REASON_UNSPECIFIED
            if not self._take(decode, token, reason):
                return
        if tokens.finish_reason:
            self._release(decode)

    def _take(self, worker: Worker, token: common_pb2.Token, reason: common_pb2.FinishReason.ValueType) -> bool:
        if self.answer.take(token, reason):
            if self.answer.over:
                finished = self.answer.finished
                finished.prefill_worker = self._prefill.worker_id if self._prefill else ""
                finished.decode_worker = self._decode.worker_id if self._decode else ""
                finished.replays = self._attempt
            return True
        missing = f"worker {worker.worker_id} left out token {len(self.answer.sent)} of the answer"
        self._failed(worker, common_pb2.Failure(code=10, message=missing, retryable=True), ended=False)
        return False

    # ------------------------------------------------------------------ failures

    def _gone(self, worker: Worker) -> None:
        """The worker's stream broke. Before the first token prefill is to blame, after it decode."""
        serving = self._decode if self._begun else self._prefill
        if worker is not serving and worker is not self._decode:
            self._release(worker)
            return
        self._release(worker)
        self._excluded |= {worker.worker_id}
        if worker is serving:
            self._dead.append(worker.worker_id)
            if len(self._dead) >= MAX_DEATHS:
                names = " and ".join(self._dead)
                message = f"this request ended two workers ({names}) and is not tried again"
                raise HeadwayError(grpc.StatusCode.INTERNAL, message)
        else:
            self._count_retry(f"decode worker {worker.worker_id} went away")
        self._next_attempt()
        self.start()

    def _failed(self, worker: Worker, failure: common_pb2.Failure, *, ended: bool = True) -> None:
        """`ended`: the worker has nothing of the sequence any more."""
        if ended:
            self._release(worker)
        if not failure.retryable:
            raise HeadwayError(status_code(failure.code), failure.message)
        self._count_retry(failure.message, status_code(failure.code))
        if failure.code == grpc.StatusCode.UNAVAILABLE.value[0]:
            # Its next status says when it is ready again.
            worker.load.ready = False
        self._next_attempt()
        now = time.monotonic()
        self._not_before = now + BACKOFF_S * self._retries
        asyncio.get_running_loop().call_later(BACKOFF_S * self._retries, self.inbox.poke)
        self._park(now, self._config.no_worker_timeout_s)

    def _count_retry(self, message: str, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self._retries += 1
        if self._retries > MAX_RETRIES:
            raise HeadwayError(code, message)

    def _next_attempt(self) -> None:
        self._end_attempt()
        self._attempt += 1
        self._prefill = self._decode = None

    def _park(self, now: float, seconds: float) -> None:
        self.parked = True
        self._give_up_at = now + seconds
        self._fleet.waiting.add(self.inbox)
        asyncio.get_running_loop().call_later(seconds, self.inbox.poke)

    def _unpark(self) -> None:
        self.parked = False
        self._fleet.waiting.discard(self.inbox)
