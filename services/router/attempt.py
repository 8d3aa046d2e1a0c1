"""One attempt at a sequence: the workers that serve it, what they may hold of it, and what it adds to their load."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from headway.core.reserve import Reservation
from headway.v1 import common_pb2, decode_pb2, prefill_pb2

if TYPE_CHECKING:
    from services.router.choice import Choice
    from services.router.fleet import Worker


class Attempt:
    """Prefill and decode apart, or (`prefill` None) a decode worker by itself.

    `_held` are the workers that may still hold something of the sequence; `end` cancels it there. Events about it
    reach `choice` as long as it is held.
    """

    def __init__(
        self,
        choice: Choice,
        sequence_id: str,
        number: int,
        prefill: Worker | None,
        decode: Worker,
        reservation: Reservation,
        pull: common_pb2.PullHint | None = None,
    ) -> None:
        self.number = number
        self.prefill = prefill
        self.decode = decode
        # Whether decode is on its own: what prefill does from now on is of no interest.
        self.begun = prefill is None
        self._pull = pull
        self._choice = choice
        self._sequence_id = sequence_id
        self._held: list[Worker] = []
        # What it adds to the loads of its workers.
        self._reservation = reservation

    @property
    def serving(self) -> Worker:
        """Who is to blame if the sequence kills a worker now."""
        return self.decode if self.begun or self.prefill is None else self.prefill

    def dispatch(self, pieces: list[common_pb2.Sequence]) -> None:
        """One command a piece to each worker."""
        if self.prefill is None:
            for piece in pieces:
                self.decode.link.send(start=decode_pb2.DecodeStart(sequence=piece, pull=self._pull))
        else:
            for piece in pieces:
                self._dispatch_apart(self.prefill, piece)
            self._hold(self.prefill)
        self._hold(self.decode)

    def _dispatch_apart(self, prefill: Worker, piece: common_pb2.Sequence) -> None:
        """On one node decode need not know before prefill is done; on another it takes slots and follows at once."""
        start = prefill_pb2.PrefillStart(sequence=piece, decode_worker=self.decode.worker_id, pull=self._pull)
        expect = decode_pb2.DecodeExpect(sequence=piece)
        if self.crosses_nodes:
            start.decode_node = self.decode.hello.node_id
            expect.prefill_kvstore = prefill.hello.kvstore_address
            self.decode.link.send(expect=expect)
        else:
            self.decode.link.send_soon(expect=expect)
        prefill.link.send(start=start)

    @property
    def crosses_nodes(self) -> bool:
        """The handoff is a transfer."""
        return self.prefill is not None and self.prefill.load.node != self.decode.load.node

    def begin(self, first: prefill_pb2.FirstToken) -> None:
        """Decode takes over the lease; prefill holds it until decode has joined."""
        begin = decode_pb2.DecodeBegin(
            sequence_id=self._sequence_id,
            attempt=self.number,
            lease_id=first.lease_id,
            epoch=first.epoch,
            first_token=first.token,
        )
        self.decode.link.send(begin=begin)

    def decoding(self) -> None:
        """The decode worker sent tokens: the lease is its own, the prompt is computed."""
        if self.prefill is not None:
            self.release(self.prefill)
        self.computed()

    def computed(self) -> None:
        """The prompt does not wait any more."""
        self._reservation.computed(time.monotonic())

    def release(self, worker: Worker) -> None:
        """The worker has nothing of the sequence any more."""
        if worker in self._held:
            self._held.remove(worker)
            worker.link.routes.pop(self._sequence_id, None)

    def end(self) -> None:
        """Nothing is left behind: whoever may hold something is told to stop."""
        self._reservation.leave(time.monotonic())
        for worker in list(self._held):
            worker.link.cancel(self._sequence_id, self.number)
            self.release(worker)

    def _hold(self, worker: Worker) -> None:
        worker.link.routes[self._sequence_id] = self._choice
        self._held.append(worker)
