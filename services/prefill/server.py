"""The prefill worker: prompts in, KV in the slab, a first token out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from headway.core.leases import REMOTE
from headway.core.model import ModelCard
from headway.core.sequence import Finish
from headway.engine.contract import Drawn
from headway.runtime.config import load_or_exit
from headway.runtime.server import run_service
from headway.v1 import common_pb2, prefill_pb2, prefill_pb2_grpc
from headway.worker.active import Active
from headway.worker.config import WorkerConfig
from headway.worker.convert import FINISH, Pieces, failure, pull_from_proto, sequence_from_proto, token_to_proto
from headway.worker.loop import EngineLoop
from headway.worker.main import run_worker
from headway.worker.runs import RunStream, router_of

PROGRAM = "headway-prefill"
Requests = AsyncIterator[prefill_pb2.PrefillServiceRunRequest]


@dataclass(frozen=True)
class PrefillConfig(WorkerConfig):
    """Prefill worker of Headway: turns prompts into KV cache and a first token."""


class PrefillRun:
    """The sequences of one router on this worker."""

    def __init__(self, loop: EngineLoop, card: ModelCard, router_id: str) -> None:
        self.router_id = router_id
        self._card = card
        self._loop = loop
        self._pieces = Pieces()
        self.stream: RunStream[prefill_pb2.PrefillEvent] = RunStream(loop, router_id)

    def handle(self, command: prefill_pb2.PrefillCommand) -> None:
        if command.HasField("cancel"):
            self._pieces.drop(command.cancel.sequence_id, command.cancel.attempt)
            self.stream.cancel(command.cancel)
        elif message := self._pieces.add(command.start.sequence):
            self._start(message, command.start)

    def _start(self, message: common_pb2.Sequence, start: prefill_pb2.PrefillStart) -> None:
        try:
            sequence = sequence_from_proto(message, self._card)
        except ValueError as error:
            problem = failure(grpc.StatusCode.INVALID_ARGUMENT, str(error), retryable=False)
            self._put(message.sequence_id, message.attempt, failure=problem)
            return
        joiner = f"{REMOTE}{start.decode_node}" if start.decode_node else start.decode_worker
        active = self._loop.start(sequence, self, joiner=joiner, pull=pull_from_proto(start))
        self.stream.actives[sequence.sequence_id, sequence.attempt] = active

    def drawn(self, active: Active, drawn: Drawn, output_index: int, finish: Finish | None) -> None:
        sequence = active.sequence
        computed = len(sequence.tokens) - 1 - sequence.cached_tokens
        first = prefill_pb2.FirstToken(
            token=token_to_proto(drawn, output_index),
            lease_id=active.lease_id,
            epoch=self._loop.slab.epoch if self._loop.slab else 0,
            cached_tokens=sequence.cached_tokens,
            computed_tokens=computed,
            timings=common_pb2.Timings(
                queue_s=active.started_s - active.received_s,
                prefill_s=active.first_token_s - active.started_s,
                prefilled_at_s=active.first_token_s,
            ),
            finish_reason=FINISH[finish],
            pulled_bytes=active.pulled_bytes,
        )
        self.stream.forget(sequence)
        self._put(sequence.sequence_id, sequence.attempt, first_token=first)

    def failed(self, active: Active, failure: common_pb2.Failure) -> None:
        self.stream.forget(active.sequence)
        self._put(active.sequence.sequence_id, active.sequence.attempt, failure=failure)

    def _put(
        self,
        sequence_id: str,
        attempt: int,
        *,
        first_token: prefill_pb2.FirstToken | None = None,
        failure: common_pb2.Failure | None = None,
    ) -> None:
        self.stream.put(
            prefill_pb2.PrefillEvent(sequence_id=sequence_id, attempt=attempt, first_token=first_token, failure=failure)
        )


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, loop: EngineLoop, card: ModelCard) -> None:
        self._loop = loop
        self._card = card

    async def Run(
        self, request_iterator: Requests, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillServiceRunResponse]:
        run = PrefillRun(self._loop, self._card, router_of(context))
        async for events in run.stream.serve(request_iterator, run.handle):
            yield prefill_pb2.PrefillServiceRunResponse(events=events)


def _add(server: grpc.aio.Server, loop: EngineLoop, card: ModelCard) -> None:
    prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(loop, card), server)


def main() -> None:
    config = load_or_exit(PrefillConfig, PROGRAM)
    service = prefill_pb2.DESCRIPTOR.services_by_name["PrefillService"].full_name
    role = common_pb2.WORKER_ROLE_PREFILL
    run_service(PROGRAM, lambda: run_worker(config, PROGRAM, role, service, _add))


if __name__ == "__main__":
    main()
