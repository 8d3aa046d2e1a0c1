"""The decode worker: joins leases, runs the batch, sends each step's tokens; prefills by itself where told to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from headway.core.model import ModelCard
from headway.core.sequence import Finish, Sequence
from headway.engine.contract import Drawn
from headway.runtime.config import load_or_exit, option
from headway.runtime.server import run_service
from headway.v1 import common_pb2, decode_pb2, decode_pb2_grpc
from headway.worker.active import Active
from headway.worker.config import WorkerConfig
from headway.worker.convert import FINISH, Pieces, failure, pull_from_proto, sequence_from_proto, token_to_proto
from headway.worker.loop import EngineLoop
from headway.worker.main import run_worker
from headway.worker.runs import RunStream, router_of

PROGRAM = "headway-decode"
Requests = AsyncIterator[decode_pb2.DecodeServiceRunRequest]
ROLES = {"decode": common_pb2.WORKER_ROLE_DECODE, "mixed": common_pb2.WORKER_ROLE_MIXED}

# Sequences announced by Expect whose Begin never came; the oldest are dropped beyond this.
MAX_EXPECTED = 16384


@dataclass(frozen=True)
class DecodeConfig(WorkerConfig):
    """Decode worker of Headway: turns KV cache into the rest of the answer."""

    role: str = option("decode", "decode, or mixed: prefills all by itself", choices=("decode", "mixed"))


class DecodeRun:
    """The sequences of one router on this worker."""

    def __init__(self, loop: EngineLoop, card: ModelCard, router_id: str) -> None:
        self.router_id = router_id
        self._card = card
        self._loop = loop
        self._pieces = Pieces()
        self._expected: OrderedDict[tuple[str, int], Sequence] = OrderedDict()
        loop.expected[router_id] = self._expected
        self.stream: RunStream[decode_pb2.DecodeEvent] = RunStream(loop, router_id)

    def close(self) -> None:
        """The router is gone, or has another stream already."""
        if self._loop.expected.get(self.router_id) is self._expected:
            del self._loop.expected[self.router_id]

    def handle(self, command: decode_pb2.DecodeCommand) -> None:
        if command.HasField("begin"):
            self._begin(command.begin)
        elif command.HasField("cancel"):
            cancel = command.cancel
            self._expected.pop((cancel.sequence_id, cancel.attempt), None)
            self._pieces.drop(cancel.sequence_id, cancel.attempt)
            self.stream.cancel(cancel)
        elif command.HasField("expect"):
            self._expect(command.expect)
        elif sequence := self._whole(command.start.sequence):
            self._watch(sequence, self._loop.start(sequence, self, pull=pull_from_proto(command.start)))

    def _expect(self, expect: decode_pb2.DecodeExpect) -> None:
        sequence = self._whole(expect.sequence)
        if sequence is None:
            return
        if expect.prefill_kvstore:
            self._watch(sequence, self._loop.expect(sequence, self, expect.prefill_kvstore))
        else:
            self._expected[sequence.sequence_id, sequence.attempt] = sequence
            if len(self._expected) > MAX_EXPECTED:
                self._expected.popitem(last=False)

    def _begin(self, begin: decode_pb2.DecodeBegin) -> None:
        key = (begin.sequence_id, begin.attempt)
        active = self.stream.actives.get(key)
        if active is not None and active.expecting:
            self._loop.begin(active, begin.first_token.token_id)
            return
        sequence = self._expected.pop(key, None)
        if sequence is None:
            message = "this decode worker was not told of the sequence before its begin"
            problem = failure(grpc.StatusCode.ABORTED, message, retryable=True)
            self._put(begin.sequence_id, begin.attempt, failure=problem)
            return
        sequence.tokens.append(begin.first_token.token_id)
        self._watch(sequence, self._loop.join(sequence, self, lease_id=begin.lease_id, epoch=begin.epoch))

    def _whole(self, piece: common_pb2.Sequence) -> Sequence | None:
        message = self._pieces.add(piece)
        if message is None:
            return None
        try:
            return sequence_from_proto(message, self._card)
        except ValueError as error:
            problem = failure(grpc.StatusCode.INVALID_ARGUMENT, str(error), retryable=False)
            self._put(message.sequence_id, message.attempt, failure=problem)
            return None

    def _watch(self, sequence: Sequence, active: Active) -> None:
        self.stream.actives[sequence.sequence_id, sequence.attempt] = active

    def drawn(self, active: Active, drawn: Drawn, output_index: int, finish: Finish | None) -> None:
        sequence = active.sequence
        tokens = decode_pb2.DecodeTokens(tokens=[token_to_proto(drawn, output_index)], finish_reason=FINISH[finish])
        tokens.working_copy_bytes = drawn.copied_bytes
        tokens.drafted_tokens, tokens.accepted_tokens = drawn.drafted, len(drawn.then)
        if not active.announced:
            active.announced = True
            tokens.pulled_bytes = active.pulled_bytes
            if active.joined:
                tokens.timings.handoff_s = active.ready_s - active.received_s
                tokens.timings.joined_at_s = active.ready_s
            else:
                tokens.cached_tokens = sequence.cached_tokens
                tokens.computed_tokens = len(sequence.tokens) - 1 - sequence.cached_tokens
                tokens.timings.queue_s = active.started_s - active.received_s
                tokens.timings.prefill_s = active.first_token_s - active.started_s
        if finish is not None:
            self.stream.forget(sequence)
        self._put(sequence.sequence_id, sequence.attempt, tokens=tokens)

    def failed(self, active: Active, failure: common_pb2.Failure) -> None:
        self.stream.forget(active.sequence)
        self._put(active.sequence.sequence_id, active.sequence.attempt, failure=failure)

    def _put(
        self,
        sequence_id: str,
        attempt: int,
        *,
        tokens: decode_pb2.DecodeTokens | None = None,
        failure: common_pb2.Failure | None = None,
    ) -> None:
        self.stream.put(
            decode_pb2.DecodeEvent(sequence_id=sequence_id, attempt=attempt, tokens=tokens, failure=failure)
        )


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, loop: EngineLoop, card: ModelCard) -> None:
        self._loop = loop
        self._card = card

    async def Run(self, request_iterator: Requests, context: Any) -> AsyncIterator[decode_pb2.DecodeServiceRunResponse]:
        run = DecodeRun(self._loop, self._card, router_of(context))
        try:
            async for events in run.stream.serve(request_iterator, run.handle):
                yield decode_pb2.DecodeServiceRunResponse(events=events)
        finally:
            run.close()


def _add(server: grpc.aio.Server, loop: EngineLoop, card: ModelCard) -> None:
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(loop, card), server)


def main() -> None:
    config = load_or_exit(DecodeConfig, PROGRAM)
    service = decode_pb2.DESCRIPTOR.services_by_name["DecodeService"].full_name
    run_service(PROGRAM, lambda: run_worker(config, PROGRAM, ROLES[config.role], service, _add))


if __name__ == "__main__":
    main()
